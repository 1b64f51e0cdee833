"""The errors a person at the keyboard can meet, one type per room, and the one way to suggest a near miss.

Every message names the value that was wrong, what was expected, and the nearest right thing. The command line
prints such an error as one line and exits with code 2; a service answers with a 4xx status.
"""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

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
    """`" Did you mean 'x'?"` for the known name nearest to `value`, or an empty string."""
    near = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def excerpt(value: Any) -> str:
    """`value` as a message shows it: its repr, shortened where it is long, whatever somebody put there."""
    return _SHORT.repr(value)
