"""Tokenizers: GPT-2's BPE, a BPE trained on the corpus, plain bytes, or an open model's own.

A `Tokenizer` comes from a spec ("gpt2", "bpe:2048", "bytes") or a package folder. Ours is a `tiktoken.Encoding` with
GPT-2's way of splitting text, the 256 single bytes, and <|endoftext|> as the last id. It is saved as Hugging Face's
tokenizer.json, with which `transformers` encodes identically. Any other tokenizer.json is read by
`gptcore.hf_tokenizer`, and saved as it was.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from gptcore.config import WHOLE
from gptcore.documents import MOST_BYTES, read_json, read_text
from gptcore.errors import TokenizerError, did_you_mean, excerpt
from gptcore.hf_tokenizer import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_BYTES,
    PublishedEncoding,
    read_encoding,
    without_tokenizer,
)
from gptcore.merges import Ranks, byte_characters, cut_long_space, last_merge, learn_merges
from gptcore.special import special_pattern, split_special
from gptcore.spelling import steps

EOT = "<|endoftext|>"
CHAT = ("<|im_start|>", "<|im_end|>")
"""What begins and ends a message in ChatML; a tokenizer of ours for chats has them behind <|endoftext|>."""

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's pattern for splitting text before merging, in tiktoken's faster form: contractions, letters, digits, other
characters, white space."""

SMALLEST = 257
"""Every byte and <|endoftext|>."""

DOWNLOAD_SECONDS = 30

BYTES_PER_TOKEN = 25
"""Approximate text needed to train a vocabulary: 50 kB of English give 2048 tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """A named encoding. It can be pickled, so workers need neither network nor cache."""

    name: str
    encoding: tiktoken.Encoding | PublishedEncoding = field(repr=False)
    eot: int
    """The token that ends a document in training; <|endoftext|>, or what an open model's files name first."""
    chat_template: str | None = field(default=None, repr=False)
    """The Jinja template by which a chat is formatted; an open model's files have their own."""

    @property
    def published(self) -> PublishedEncoding | None:
        """An open model's own tokenizer; None if it is one of ours."""
        return self.encoding if isinstance(self.encoding, PublishedEncoding) else None

    @property
    def vocab_size(self) -> int:
        """The largest id + 1. Ours have a token for every id below; other ids without a token decode to nothing."""
        return self.encoding.n_vocab

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a generated text, `eot` first. An open model may have several."""
        return self.published.stops if self.published else (self.eot, *range(self.eot + 2, self.vocab_size))

    @property
    def special(self) -> frozenset[int]:
        """The special tokens: no text encodes to them, and a stream leaves them out."""
        return self.published.special if self.published else frozenset(range(self.eot, self.vocab_size))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """How the special tokens are spelled, longest first."""
        return self.published.special_tokens if self.published else (EOT, *CHAT)[: self.vocab_size - self.eot]

    @property
    def special_names(self) -> dict[str, str]:
        """Special tokens by the names that `tokenizer_config.json` gives them, such as `eos_token`."""
        return self.published.special_names if self.published else {"bos_token": EOT, "eos_token": EOT}

    @property
    def bos(self) -> tuple[int, ...]:
        """What precedes every document and every prompt, as in `transformers`: Llama's BOS, none for ours."""
        return self.published.bos if self.published else ()

    @property
    def splits_lines(self) -> bool:
        """Whether a text can be cut behind a line break between visible characters without a change to its ids."""
        return self.published is None or self.published.splits_lines

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of pattern, ranks and special tokens; equal exactly if two tokenizers encode alike."""
        if isinstance(self.encoding, PublishedEncoding):
            return self.encoding.fingerprint
        digest = hashlib.sha256(PATTERN.encode())
        for token, rank in _ranks(self.encoding).items():
            digest.update(f"\n{rank} {token.hex()}".encode())
        for number, name in enumerate(self.special_tokens, start=self.eot):
            digest.update(f"\n{number} {name}".encode())
        return digest.hexdigest()

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids of `text`, without `bos`; the characters of a special token are encoded as ordinary text.

        Unless it `begins`, it is the rest of a text that was cut as `splits_lines` allows.
        """
        if isinstance(self.encoding, PublishedEncoding):
            return self.encoding.encode(text, begins)
        ids: list[int] = []
        for piece in cut_long_space(text):
            ids += self.encoding.encode_ordinary(piece)
        return ids

    def encode_special(self, text: str, dropped: str, free: str) -> list[tuple[int, int]]:
        """Token ids of `text`, without `bos`, in which a special token's characters are that token.

        Each comes with the place in `text` where it begins. The characters of `dropped` are left out, and keep others
        around them from being a special token. `free` is a character that the text does not contain.
        """
        parts = split_special(text, self._special, dropped)
        if isinstance(self.encoding, PublishedEncoding):
            return self.encoding.encode_parts(parts, free)
        ids: list[tuple[int, int]] = []
        for part in parts:
            plain = self.encode(part.text)
            ids += zip(plain, map(part.place, self.encoding.decode_with_offsets(plain)[1]), strict=True)
            ids += [(self.eot + self.special_tokens.index(part.special), part.end)] if part.special else []
        return ids

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return self.published.special_pattern if self.published else special_pattern(self.special_tokens)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that a model continues: `bos` and `text`. Without `bos`, an empty text is begun by `eot`."""
        return [*self.bos, *self.encode(text)] or [self.eot]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` behind other text, which may contain incomplete characters."""
        return self.encoding.decode_bytes(list(ids))

    def first_bytes(self, token: int) -> bytes:
        """The bytes of `token` at the beginning of a text, where sentencepiece's have no leading space."""
        if self.published:
            return self.published.spelling.first(self.published.token(token))
        return self.decode_bytes([token])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        if self.published:
            return self.published.decode(list(ids))
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spelling(self, token: int) -> str:
        """The token as in tokenizer.json: for a byte-level BPE, a printable character for each byte."""
        if self.published:
            return self.published.token(token)
        shown = byte_characters()
        if token >= self.eot:
            return self.special_tokens[token - self.eot]
        return "".join(shown[b] for b in self.decode_bytes([token]))


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
        merges = learn_merges(train_texts(), size - SMALLEST)
        if len(merges) < size - SMALLEST:
            raise TokenizerError(
                f"the training text is too small, or repeats itself too much, to learn {size} tokens from; "
                f"bpe:{SMALLEST + len(merges)} is the largest it can give. Use --tokenizer bytes, a smaller bpe:N, or "
                f"about {BYTES_PER_TOKEN * size:,} bytes of text"
            )
        ranks.update((token, 256 + i) for i, token in enumerate(merges))
    return _build(ranks, spec)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, for AutoTokenizer and `read_tokenizer`.

    An open model's tokenizer is written as the files that it was read from.
    """
    if isinstance(tokenizer.encoding, PublishedEncoding):
        for name, content_bytes in tokenizer.encoding.files:
            (folder / name).write_bytes(content_bytes)
        return
    # The generic class uses tokenizer.json unchanged; GPT2Tokenizer would rebuild it.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    for name, value in ((TOKENIZER, tokenizer_json(tokenizer)), (CONFIG, config)):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json; an open model's is the one that it was read from."""
    if isinstance(tokenizer.encoding, PublishedEncoding):
        return tokenizer.encoding.content(TOKENIZER)
    ranks, shown = _ranks(tokenizer.encoding), byte_characters()

    def spell(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    merges = [last_merge(token, ranks) for token in ranks if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {token: number for number, token in enumerate(tokenizer.special_tokens, start=tokenizer.eot)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in special.items()],
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
            "vocab": {**{spell(token): rank for token, rank in ranks.items()}, **special},
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`: one, or vocabulary and merges, or none."""
    whole, parts = folder / TOKENIZER, [folder / "vocab.json", folder / "merges.txt"]
    return [whole] if whole.is_file() else parts if all(part.is_file() for part in parts) else []


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`: tokenizer.json, or GPT-2's vocab.json with merges.txt.

    Raises TokenizerError if there is none, or if it is of a kind that cannot be kept exactly.
    """
    files = tokenizer_files(folder)
    if not files:
        raise TokenizerError(without_tokenizer(folder))
    content = read_json(files[0], TOKENIZER_BYTES, TokenizerError)
    try:
        if len(files) == 1:
            _check_ours(content)
            vocab, merges = dict(content["model"]["vocab"]), content["model"]["merges"]
            specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        else:
            vocab = content
            lines = read_text(files[1], TOKENIZER_BYTES, TokenizerError).split("\n")
            merges = [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]
            specials = {EOT: vocab[EOT]} if EOT in vocab else {}
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        return replace(_from_vocab(vocab, pairs, specials), chat_template=_chat_template(folder))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if len(files) > 1:
            raise TokenizerError(f"the tokenizer in {folder} is not a readable GPT-2-style BPE: {error}") from error
    encoding = read_encoding(folder)
    kind = "byte-level BPE" if encoding.spelling.byte_level else "sentencepiece BPE"
    return Tokenizer(kind, encoding, encoding.stops[0])


def _chat_template(folder: Path) -> str | None:
    """The chat template in tokenizer_config.json, if there is one."""
    file = folder / CONFIG
    found = read_json(file, MOST_BYTES, TokenizerError).get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else None


def _check_ours(content: dict[str, Any]) -> None:
    """Raises ValueError unless tokenizer.json describes a byte-level BPE with GPT-2's splitting and nothing else."""
    kind, splits = content["model"].get("type", "BPE"), content.get("pre_tokenizer") or {}
    if kind != "BPE":
        raise ValueError(f"its model is {kind!r}, expected 'BPE'")
    if splits.get("type") != "ByteLevel" or not splits.get("use_regex", True) or splits.get("add_prefix_space"):
        raise ValueError("it splits text by other rules than GPT-2's")
    if content.get("normalizer"):
        raise ValueError("it normalises text first, so it does not keep every byte")
    for step in steps(content.get("post_processor"), "processors"):
        template = step["single"] if step["type"] == "TemplateProcessing" else []
        if step["type"] not in ("ByteLevel", "TemplateProcessing") or any("SpecialToken" in part for part in template):
            raise ValueError("it adds tokens to a text")


def _from_vocab(vocab: dict[str, int], merges: list[tuple[str, ...]], specials: dict[str, int]) -> Tokenizer:
    """A tokenizer from tokens spelled in GPT-2's byte characters. Raises ValueError if it is not one of ours."""
    if any(type(number) is not int for number in (*vocab.values(), *specials.values())):
        raise ValueError("some of its ids are no whole numbers")
    if set(specials) not in ({EOT}, {EOT, *CHAT}):
        raise ValueError(f"its special tokens are {excerpt(sorted(specials))}, expected only {EOT!r}")
    byte_of = {character: b for b, character in byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items() if token not in specials}
    behind = [specials[token] for token in (EOT, *CHAT) if token in specials]
    if [*sorted(ranks.values()), *behind] != list(range(len(ranks) + len(behind))):
        raise ValueError(f"its ids are not 0 to {len(ranks) + len(behind) - 1} with {EOT} behind the others")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("it lacks some of the 256 single bytes")
    order = [vocab[left + right] for left, right in merges]
    if len(order) != len(ranks) - 256 or any(a >= b for a, b in pairwise(order)):
        raise ValueError("its merges are not in the order of its ids")
    name = "gpt2" if ranks[b"!"] == 0 and len(ranks) == 50256 else f"bpe:{len(ranks) + 1}"
    return _build(ranks, name if order else "bytes", chats=len(specials) > 1)


def _build(ranks: Ranks, name: str, chats: bool = False) -> Tokenizer:
    eot = len(ranks)
    special = {token: eot + number for number, token in enumerate((EOT, *CHAT) if chats else (EOT,))}
    encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, eot)


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of ours with the special tokens of CHAT, and their ids behind all others."""
    assert isinstance(tokenizer.encoding, tiktoken.Encoding)
    return _build(_ranks(tokenizer.encoding), tokenizer.name, chats=True)


def _ranks(encoding: tiktoken.Encoding) -> Ranks:
    """The ids of all tokens but the special ones, which are the last, in ascending order."""
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
