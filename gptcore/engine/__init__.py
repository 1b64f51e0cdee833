"""Continuous batching: many sequences share one model, and join and leave the batch at any step.

Takes `Request`s and returns `Update`s. Each step schedules, runs the model and postprocesses (`engine`). Each kind of
state has one owner: `scheduler` the queue, `cache` the slots, the runner the keys and values. `AsyncEngine` is the
interface for asyncio.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gptcore.engine.settings import EngineSettings

if TYPE_CHECKING:
    from gptcore.engine.async_engine import AsyncEngine, Stream
    from gptcore.engine.engine import Engine
    from gptcore.engine.interface import EngineInfo, EngineStats, FinishReason, Request, TokenLogprob, Update

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineInfo",
    "EngineSettings",
    "EngineStats",
    "FinishReason",
    "Request",
    "Stream",
    "TokenLogprob",
    "Update",
]

PLACES = {"AsyncEngine": "async_engine", "Stream": "async_engine", "Engine": "engine"}
"""Modules of the names that are not in `interface`."""


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `serve run` needs the settings alone, and torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES.get(name, 'interface')}"), name)
