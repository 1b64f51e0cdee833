"""Continuous batching: many sequences share one model, and join and leave the batch at any step.

Takes `Request`s and returns `Update`s. Each step schedules, runs the model and postprocesses (`engine`). Each kind of
state has one owner: `scheduler` the queue, `cache` the slots, the runner the keys and values. `AsyncEngine` is the
interface for asyncio.
"""

from gptcore.engine.async_engine import AsyncEngine, Stream
from gptcore.engine.engine import Engine
from gptcore.engine.interface import EngineInfo, EngineStats, FinishReason, Request, TokenLogprob, Update
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
