"""Continuous batching: many sequences share one model, and join and leave it at any step.

In come `Request`s, out come `Update`s. The loop is schedule, run, postprocess (`engine`), and each kind of state has
one owner: `scheduler` the order, `cache` the slots, `runner` the keys and values. `AsyncEngine` is the way in for
asyncio.
"""

from gptcore.engine.async_engine import AsyncEngine, Stream
from gptcore.engine.engine import Engine, EngineInfo, EngineStats
from gptcore.engine.interface import FinishReason, Request, TokenLogprob, Update
from gptcore.engine.settings import EngineSettings

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
