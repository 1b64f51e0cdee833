"""The service with an engine whose steps take a given time: `serve run bench.paced:build_app step_ms=25 …`.

Two cores cannot compute for four replicas at once, and four replicas that share them would only slow each other down.
On a GPU of its own, a replica's CPU mostly waits for the device. So here the model is small, and the engine sleeps for
the rest of each step. Everything else is the real service.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

from ray import serve

from gptcore.engine import Engine, EngineSettings, Update
from gptcore.package import Package
from serve_app.deployment import build_app as build_real_app


class PacedEngine(Engine):
    """An engine whose steps take at least `seconds`, however many sequences it runs."""

    def __init__(self, seconds: float, package: Package, settings: EngineSettings) -> None:
        super().__init__(package, settings)
        self._seconds = seconds

    def step(self) -> list[Update]:
        """Run one step, and sleep until its time is over."""
        end = time.monotonic() + self._seconds
        updates = super().step()
        time.sleep(max(0.0, end - time.monotonic()))
        return updates


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """`serve_app:build_app`, with the further argument `step_ms`."""
    settings = dict(args)
    seconds = float(settings.pop("step_ms")) / 1e3
    return build_real_app(settings, functools.partial(PacedEngine, seconds))
