"""The errors a person at the keyboard can meet, one type per room, and the one way to suggest a near miss.

Every message names the value that was wrong, what was expected, and the nearest right thing. The command line
prints such an error as one line and exits with code 2; a service answers with a 4xx status.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

MAX_TYPOS = 4
"""Letters that a long name may be away from what was meant; a name of four letters may be one away."""
_MARKS = re.compile(r"[-_ :]")
_DIGIT = re.compile(r"\d")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class FoundryError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(FoundryError):
    """A setting, preset, flag or parameter that does not exist or does not fit; `param` is its name, if it has one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoMemory(ConfigError):
    """A setting that asks for more memory than is free now; it may fit once others have given theirs back."""


class TokenizerError(FoundryError):
    """A tokenizer that cannot be found, read or learned."""


class PackageError(FoundryError):
    """A model package that is missing, altered, cut short or of an unknown kind."""


class HubError(FoundryError):
    """A model name that leads to no package."""


class CorpusError(FoundryError):
    """Text to train on that is missing, empty, binary or too small."""


class CheckpointError(FoundryError):
    """Training state that is missing, damaged, or of another run."""


class DamagedCheckpoint(CheckpointError):
    """One that is not whole any more: an older one may be."""


class RecordError(FoundryError):
    """A file in which a run keeps something about itself that is empty, cut short, altered or missing."""


class TrainingError(FoundryError):
    """Training that cannot go on: a loss that is no longer a number, a full disk."""


class StorageFull(TrainingError):
    """A disk, quota or store that takes no more."""


class EngineError(FoundryError):
    """An engine that died or was closed, or whose books of sequences and slots do not agree."""


class QueueFull(FoundryError):
    """A request that the engine has no room for now: as many wait already as may."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name that `value` is a slip of, or an empty string."""
    slips = {name: cost for name in known if name != value and (cost := _typo_cost(value, name)) is not None}
    return f" Did you mean {min(slips, key=slips.__getitem__)!r}?" if slips else ""


def _typo_cost(value: str, name: str) -> int | None:
    """How many letters were lost, added or (two for one) mistaken on the way from `name` to `value`; None if too many.

    Case and the marks between words do not count, nor does a suffix that both have: `a.txt` is not near `b.txt`.
    Numbers that differ count as one letter. A name of which `value` is the beginning, or a contraction as bf16 is of
    bfloat16, comes behind those that are a letter or two away.
    """
    wrong, right = PurePath(value.casefold()), PurePath(name.casefold())
    common = right.suffix if wrong.suffix == right.suffix else ""
    a, b = (_MARKS.sub("", text.casefold().removesuffix(common)) for text in (value, name))
    allowed = min((max(len(a), len(b)) - 1) // 2, MAX_TYPOS)
    if a == b:
        return 0
    if 2 < len(a) == len(b) <= 4 and _swapped(a, b):
        return 1
    if abs(len(a) - len(b)) <= allowed:
        renumbered = len(a) == len(b) and _DIGIT.findall(a) != _DIGIT.findall(b)
        alike = difflib.SequenceMatcher(None, _DIGIT.sub("0", a), _DIGIT.sub("0", b), autojunk=False).ratio()
        cost = round((len(a) + len(b)) * (1 - alike)) + renumbered
        if cost <= allowed:
            return cost
    shortened = len(a) >= 4 and (b.startswith(a) or _contracted(a, b))
    return len(b) - len(a) + MAX_TYPOS if shortened else None


def _contracted(a: str, b: str) -> bool:
    """Whether `a` is `b` with at most half of its letters left out, none at its ends."""
    letters = iter(b)
    return (a[0], a[-1]) == (b[:1], b[-1:]) and 2 * len(a) >= len(b) and all(letter in letters for letter in a)


def _swapped(a: str, b: str) -> bool:
    """Whether `a` is `b` with two neighbours in each other's place."""
    return any(a == b[:n] + b[n + 1] + b[n] + b[n + 2 :] for n in range(len(b) - 1))


def excerpt(value: Any) -> str:
    """`value` as a message shows it: its repr, shortened where it is long, whatever somebody put there."""
    return _SHORT.repr(value)
