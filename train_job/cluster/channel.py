"""How a run's worker and its driver reach each other: an actor that holds events, a stop flag and a final problem.

It imports neither torch nor Ray Train, which would take seconds of a run's start.
"""

import asyncio
from typing import Any

from gptcore.errors import FoundryError
from train_job.environment import LIGHT
from train_job.training.events import Event


class Channel:
    """The actor. Rank 0 posts events, the driver reads them and sets the stop flag."""

    def __init__(self) -> None:
        self.events: list[Event | str] = []
        self.stop = asyncio.Event()
        self.problem: FoundryError | None = None

    async def post(self, event: Event | str) -> None:
        """Adds an event, or a line for the console."""
        self.events.append(event)

    async def read(self) -> list[Event | str]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    async def set_stop(self) -> None:
        """Asks the worker to stop."""
        self.stop.set()

    async def wait_for_stop(self) -> None:
        """Returns once the stop flag is set."""
        await self.stop.wait()

    async def fail(self, problem: FoundryError) -> None:
        """Records a problem that a restart would only meet again."""
        self.problem = self.problem or problem

    async def failed(self) -> FoundryError | None:
        """The first problem that was recorded."""
        return self.problem


def start_channel(ray: Any) -> Any:
    """Starts a channel on this node, so that it ends with its driver and not with another machine; it takes no CPU."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    light = {"env_vars": {LIGHT: "1"}}
    return ray.remote(Channel).options(num_cpus=0, label_selector=here, runtime_env=light).remote()
