"""Special tokens in a text: where they are, and which text lies between them.

In: a text whose special tokens are spelled, as a chat template makes it. Out: its parts, whose characters know where
they were, so that each token knows it as well.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Text without special tokens, and the special token that ends it, or an empty string; it begins at `end`."""

    text: str
    special: str
    end: int
    runs: Sequence[tuple[int, int]]
    """Where runs of characters begin in `text`, and where they began before others were dropped."""

    def place(self, index: int) -> int:
        """Where the character `text[index]` was."""
        here, there = self.runs[bisect_right(self.runs, index, key=lambda run: run[0]) - 1]
        return there + index - here


def special_pattern(tokens: Sequence[str], left: Collection[str] = (), right: Collection[str] = ()) -> re.Pattern[str]:
    """Matches the tokens; those in `left` and `right` take along the white space on that side."""
    space = r"\s*"
    return re.compile("|".join(f"{space * (t in left)}{re.escape(t)}{space * (t in right)}" for t in tokens))


def split_special(text: str, special: re.Pattern[str], dropped: str) -> Iterator[Part]:
    """The parts of `text` without the characters of `dropped`; the last one ends without a special token."""
    start, kept = 0, re.compile(f"[^{re.escape(dropped)}]+")
    for found in (*special.finditer(text), None):
        end = found.start() if found else len(text)
        runs, texts, size = [], [], 0
        for run in kept.finditer(text, start, end):
            runs.append((size, run.start()))
            texts.append(run[0])
            size += len(run[0])
        yield Part("".join(texts), found[0].strip() if found else "", end, runs or [(0, start)])
        start = found.end() if found else end
