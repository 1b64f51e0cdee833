"""The errors that users can meet, and suggestions for typos.

Every message contains the invalid value, what was expected, and a suggestion if there is one. The command line prints
such an error as one line and exits with code 2; a service replies with a 4xx status.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

MAX_TYPOS = 4
"""Most wrong letters in a long name for a suggestion; in a name of four letters, one."""
_MARKS = re.compile(r"[-_ :]")
_DIGIT = re.compile(r"\d")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class FoundryError(Exception):
    """Base of errors caused by input or the environment, not by a bug."""


class ConfigError(FoundryError):
    """An unknown or invalid setting, preset, flag or parameter; `param` is its name, if it has one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoMemory(ConfigError):
    """A setting that needs more memory than is free now; it may work later."""


class TokenizerError(FoundryError):
    """A tokenizer that cannot be found, read or trained."""


class PackageError(FoundryError):
    """A model package that is missing, altered, truncated or of an unknown kind."""


class ExportError(FoundryError):
    """A model that another format cannot hold, or a file in it that cannot be written."""


class HubError(FoundryError):
    """A model name for which no package can be found."""


class CorpusError(FoundryError):
    """A training text that is missing, empty, binary or too small."""


class CheckpointError(FoundryError):
    """A checkpoint that is missing, damaged, or from another run."""


class DamagedCheckpoint(CheckpointError):
    """A damaged checkpoint; an older one may be intact."""


class RecordError(FoundryError):
    """A run's record file that is empty, truncated, altered or missing."""


class TrainingError(FoundryError):
    """Training that cannot continue: a loss that is NaN, a full disk."""


class StorageFull(TrainingError):
    """A full disk, quota or store."""


class EngineError(FoundryError):
    """An engine that died, was closed, or has inconsistent sequences and slots."""


class QueueFull(FoundryError):
    """A request that the engine refuses because its queue is full."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name that `value` is a typo of, or an empty string."""
    slips = {name: cost for name in known if name != value and (cost := _typo_cost(value, name)) is not None}
    return f" Did you mean {min(slips, key=slips.__getitem__)!r}?" if slips else ""


def _typo_cost(value: str, name: str) -> int | None:
    """The number of missing, extra or (counted twice) wrong letters in `value` compared to `name`; None if too many.

    Case, separators and a common file suffix do not count: `a.txt` is not near `b.txt`. Different numbers count as one
    letter. A name that `value` abbreviates, as bf16 does bfloat16, ranks behind names that differ by a letter or two.
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
    """Whether `a` is `b` with at most half of its letters left out, but not the first or last."""
    letters = iter(b)
    return (a[0], a[-1]) == (b[:1], b[-1:]) and 2 * len(a) >= len(b) and all(letter in letters for letter in a)


def _swapped(a: str, b: str) -> bool:
    """Whether `a` is `b` with two adjacent letters swapped."""
    return any(a == b[:n] + b[n + 1] + b[n] + b[n + 2 :] for n in range(len(b) - 1))


def excerpt(value: Any) -> str:
    """`value` for an error message: its repr, shortened."""
    return _SHORT.repr(value)
