"""Continuous batching: many sequences share one model, and join and leave it at any step.

In come `Request`s, out come `Update`s. The loop is schedule, run, postprocess (`engine`), and each kind of state has
one owner: `scheduler` the order, `cache` the slots, `runner` the keys and values. `AsyncEngine` is the way in for
asyncio.
"""

from gptcore.engine.engine import Engine, EngineInfo, EngineStats
from gptcore.engine.request import FinishReason, Request, TokenLogprob, Update
from gptcore.engine.settings import EngineSettings
from gptcore.engine.thread import AsyncEngine, Stream

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
