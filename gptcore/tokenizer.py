"""Tokenizers: GPT-2's BPE, a BPE trained on the corpus, or plain bytes.

A `Tokenizer` comes from a spec ("gpt2", "bpe:2048", "bytes") or a package folder. It is always a `tiktoken.Encoding`
with GPT-2's way of splitting text, the 256 single bytes, and <|endoftext|> as the last id. It is saved as Hugging
Face's tokenizer.json, with which `transformers` encodes identically.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from gptcore.config import WHOLE
from gptcore.documents import read_json, read_text
from gptcore.errors import TokenizerError, did_you_mean, excerpt

EOT = "<|endoftext|>"

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pattern for splitting text before merging, in tiktoken's faster form: contractions, letters, digits, other
characters, white space."""

SMALLEST = 257
"""Every byte and <|endoftext|>."""

DOWNLOAD_SECONDS = 30
TOKENIZER_BYTES = 1 << 25
"""Size limit of a tokenizer file: 32 MiB, three times the size for 150,000 tokens."""
LEARN_BYTES = 1 << 27
"""A BPE is trained on the first 128 MiB of text; with more, the merges hardly change and memory grows."""

BYTES_PER_TOKEN = 25
"""Approximate text needed to train a vocabulary: 50 kB of English give 2048 tokens."""
LONGEST_WORD = 512
"""In bytes. Longer stretches without a split are divided, since training takes quadratic time within one."""

CHUNK_CHARS = 1 << 20
LONG_SPACE = 100_000
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
SPACE_RUN = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONG_SPACE},}}")
"""Matches only at the start of a run; trying every position within shorter runs would take quadratic time."""
Ranks = dict[bytes, int]


@dataclass(frozen=True)
class Tokenizer:
    """A named encoding. It can be pickled, so workers need neither network nor cache."""

    name: str
    encoding: tiktoken.Encoding = field(repr=False)
    eot: int

    @property
    def vocab_size(self) -> int:
        """Number of ids, including <|endoftext|>."""
        return self.encoding.n_vocab

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of pattern, ranks and special tokens; equal exactly if two tokenizers encode alike."""
        digest = hashlib.sha256(PATTERN.encode())
        for token, rank in _ranks(self.encoding).items():
            digest.update(f"\n{rank} {token.hex()}".encode())
        digest.update(f"\n{self.eot} {EOT}".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the characters of a special token are encoded as ordinary text."""
        ids: list[int] = []
        for piece in _cut_long_space(text):
            ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, which may contain incomplete characters."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spelling(self, token: int) -> str:
        """The token as in tokenizer.json: a printable character for each byte."""
        shown = _byte_characters()
        return EOT if token == self.eot else "".join(shown[b] for b in self.decode_bytes([token]))


def parse_tokenizer(spec: str) -> int:
    """The vocabulary size of `spec`, including <|endoftext|>. Raises TokenizerError for an invalid spec."""
    if spec in ("gpt2", "bytes"):
        return 50257 if spec == "gpt2" else SMALLEST
    size = re.fullmatch(r"bpe:(\d+)", spec)
    if size is None:
        digits = re.search(r"\d{3,}", spec)
        known = ("gpt2", "bytes", f"bpe:{digits.group() if digits else 2048}")
        raise TokenizerError(
            f"tokenizer {spec!r} is not one of gpt2, bytes, bpe:N (as in bpe:2048).{did_you_mean(spec, known)}"
        )
    if int(size[1][:20]) > WHOLE["vocab_size"]:  # the trainer reserves room for all of them
        raise TokenizerError(f"tokenizer {excerpt(spec)} is too large; bpe:{WHOLE['vocab_size']} is the largest")
    if int(size[1]) < SMALLEST:
        raise TokenizerError(f"tokenizer {spec!r} is too small; bpe:{SMALLEST} (every byte, {EOT}) is the smallest")
    return int(size[1])


def load_tokenizer(spec: str, train_texts: Callable[[], Iterator[str]] | None = None) -> Tokenizer:
    """The tokenizer for `spec`; bpe:N is trained on `train_texts()`, the training split only.

    Raises TokenizerError for an unknown spec, an unavailable vocabulary, or a text too small for N tokens.
    """
    size = parse_tokenizer(spec)
    if spec == "gpt2":
        return _build(_gpt2_ranks(), spec)
    ranks = {bytes([b]): b for b in range(256)}
    if spec != "bytes":
        if train_texts is None:
            raise TokenizerError(f"tokenizer {spec!r} is learned from a corpus, and there is none here")
        merges = _learn_merges(train_texts(), size - SMALLEST)
        if len(merges) < size - SMALLEST:
            raise TokenizerError(
                f"the training text is too small, or repeats itself too much, to learn {size} tokens from; "
                f"bpe:{SMALLEST + len(merges)} is the largest it can give. Use --tokenizer bytes, a smaller bpe:N, or "
                f"about {BYTES_PER_TOKEN * size:,} bytes of text"
            )
        ranks.update((token, 256 + i) for i, token in enumerate(merges))
    return _build(ranks, spec)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, for AutoTokenizer and `read_tokenizer`."""
    ranks, shown = _ranks(tokenizer.encoding), _byte_characters()

    def spell(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    merges = [_last_merge(token, ranks) for token in ranks if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot, "content": EOT, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**{spell(token): rank for token, rank in ranks.items()}, EOT: tokenizer.eot},
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
    # The generic class uses tokenizer.json unchanged; GPT2Tokenizer would rebuild it.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`: one, or vocabulary and merges, or none."""
    whole, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
    return [whole] if whole.is_file() else parts if all(part.is_file() for part in parts) else []


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`: tokenizer.json, or GPT-2's vocab.json with merges.txt.

    Raises TokenizerError if there is none, or if it is not a byte-level BPE that splits text as GPT-2 does.
    """
    files = tokenizer_files(folder)
    if not files:
        raise TokenizerError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    try:
        content = read_json(files[0], TOKENIZER_BYTES, TokenizerError)
        if len(files) == 1:
            _check_gpt2_style(content)
            vocab, merges = dict(content["model"]["vocab"]), content["model"]["merges"]
            specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        else:
            vocab = content
            lines = read_text(files[1], TOKENIZER_BYTES, TokenizerError).split("\n")
            merges = [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]
            specials = {EOT: vocab[EOT]} if EOT in vocab else {}
        return _from_vocab(vocab, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges], specials)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise TokenizerError(f"the tokenizer in {folder} is not a readable GPT-2-style BPE: {error}") from error


def _check_gpt2_style(content: dict[str, Any]) -> None:
    """Raises ValueError unless tokenizer.json describes a byte-level BPE with GPT-2's splitting and nothing else."""
    kind, splits = content["model"].get("type", "BPE"), content.get("pre_tokenizer") or {}
    if kind != "BPE":
        raise ValueError(f"its model is {kind!r}, expected 'BPE'")
    if splits.get("type") != "ByteLevel" or not splits.get("use_regex", True) or splits.get("add_prefix_space"):
        raise ValueError("it splits text by other rules than GPT-2's")
    if content.get("normalizer"):
        raise ValueError("it normalises text first, so it does not keep every byte")


def _from_vocab(vocab: dict[str, int], merges: list[tuple[str, ...]], specials: dict[str, int]) -> Tokenizer:
    """A tokenizer from tokens spelled in GPT-2's byte characters. Raises ValueError if tiktoken cannot represent it."""
    if any(type(number) is not int for number in (*vocab.values(), *specials.values())):
        raise ValueError("some of its ids are no whole numbers")
    if set(specials) != {EOT}:
        raise ValueError(f"its special tokens are {excerpt(sorted(specials))}, expected only {EOT!r}")
    byte_of = {character: b for b, character in _byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items() if token not in specials}
    if sorted([*ranks.values(), specials[EOT]]) != list(range(len(ranks) + 1)) or specials[EOT] != len(ranks):
        raise ValueError(f"its ids are not 0 to {len(ranks)} with {EOT} last")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("it lacks some of the 256 single bytes")
    order = [vocab[left + right] for left, right in merges]
    if len(order) != len(ranks) - 256 or any(a >= b for a, b in pairwise(order)):
        raise ValueError("its merges are not in the order of its ids")
    if not order:
        return _build(ranks, "bytes")
    return _build(ranks, "gpt2" if ranks[b"!"] == 0 and len(ranks) == 50256 else f"bpe:{len(ranks) + 1}")


def _cut_long_space(text: str) -> list[str]:
    """`text` in pieces that encode like the whole, without very long runs of white space before a word.

    tiktoken's regex backtracks through such a run, and its stack overflows near a million characters. The pattern
    splits before the run's last character anyway, so cutting there changes nothing.
    """
    if len(text) <= LONG_SPACE:
        return [text]
    cuts = [run.end() - 1 for run in SPACE_RUN.finditer(text) if run.end() < len(text)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def _build(ranks: Ranks, name: str) -> Tokenizer:
    eot = len(ranks)
    encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: eot})
    return Tokenizer(name, encoding, eot)


def _ranks(encoding: tiktoken.Encoding) -> Ranks:
    """The ids of all tokens but <|endoftext|>, which is the last, in ascending order."""
    return {token: rank for rank, token in enumerate(encoding.decode_tokens_bytes(range(encoding.eot_token)))}


def _gpt2_ranks() -> Ranks:
    """GPT-2's published vocabulary, from tiktoken's cache or the network."""
    answer: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            answer.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:
            answer.append(error)

    # tiktoken downloads without a time limit; a daemon thread can be abandoned.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if answer and isinstance(answer[0], tiktoken.Encoding):
        return _ranks(answer[0])
    reason = type(answer[0]).__name__ if answer else f"no answer within {DOWNLOAD_SECONDS} s"
    raise TokenizerError(
        f"GPT-2's vocabulary could not be downloaded ({reason}). Offline, set TIKTOKEN_CACHE_DIR to a folder where "
        "tiktoken has cached it, or use the tokenizer bpe:2048 or bytes"
    )


def _learn_merges(texts: Iterator[str], count: int) -> list[bytes]:
    """Train up to `count` merges, most frequent pair first (Sennrich et al. 2016), each pair seen at least twice.

    Raises what `texts` raises.
    """
    from tokenizers import Tokenizer as Learner
    from tokenizers import models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = Learner(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems: list[BaseException] = []

    def chunks() -> Iterator[str]:  # the learner takes an error for the end of the text
        try:
            yield from _chunks(texts)
        except BaseException as problem:
            problems.append(problem)

    learner.train_from_iterator(chunks(), trainer)
    if problems:
        raise problems[0]
    byte_of = {character: b for b, character in _byte_characters().items()}
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [bytes(byte_of[c] for c in left + right) for left, right in merges]


def _chunks(texts: Iterator[str]) -> Iterator[str]:
    """The first LEARN_BYTES of `texts` in pieces, since the learner holds many bytes per character of a piece."""
    left = LEARN_BYTES
    for text in texts:
        for start in range(0, len(text), CHUNK_CHARS):
            chunk = text[start : start + CHUNK_CHARS].encode("utf-8", errors="replace")
            left -= len(chunk)
            yield chunk.decode()
            if left <= 0:
                return


def _last_merge(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: what BPE leaves of its bytes with the earlier merges alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@cache
def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(hidden)}}
