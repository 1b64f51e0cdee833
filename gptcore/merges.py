"""The merges of a byte-level BPE: learned from text, or found again in a vocabulary; and how tokens are spelled."""

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

LEARN_BYTES = 1 << 27
"""A BPE is trained on the first 128 MiB of text; with more, the merges hardly change and memory grows."""
LONGEST_WORD = 512
"""In bytes. Longer stretches without a split are divided, since training takes quadratic time within one."""

CHUNK_CHARS = 1 << 20
LONG_SPACE = 100_000
SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
SPACE_RUN = re.compile(rf"(?<!{SPACE}){SPACE}{{{LONG_SPACE},}}")
"""Matches only at the start of a run; trying every position within shorter runs would take quadratic time."""
SAMPLED = 1000
SPACE_SAMPLES = re.compile(rf"{SPACE}{{{LONG_SPACE // SAMPLED}}}")
"""A run of LONG_SPACE characters has so many among every SAMPLED-th one of the text, which are soon searched."""
Ranks = dict[bytes, int]


def learn_merges(texts: Iterator[str], count: int) -> list[bytes]:
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
    byte_of = {character: b for b, character in byte_characters().items()}
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


def last_merge(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: what BPE leaves of its bytes with the earlier merges alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@cache
def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(hidden)}}


def cut_long_space(text: str) -> list[str]:
    """`text` in pieces that encode like the whole, without very long runs of white space before a word.

    tiktoken's regex backtracks through such a run, and its stack overflows near a million characters. The pattern
    splits before the run's last character anyway, so cutting there changes nothing.
    """
    if len(text) <= LONG_SPACE or not SPACE_SAMPLES.search(text[::SAMPLED]):
        return [text]
    cuts = [run.end() - 1 for run in SPACE_RUN.finditer(text) if run.end() < len(text)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
