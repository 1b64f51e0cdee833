"""Where a run's worker and its driver leave messages for each other: an actor of its own.

It imports neither torch nor Ray Train, which would take it seconds of a run's start.
"""

import asyncio

from gptcore.errors import FoundryError
from train_job.training.events import Event


class Board:
    """An actor where rank 0 pins news for the driver, and the driver the wish to stop."""

    def __init__(self) -> None:
        self.events: list[Event | str] = []
        self.stop = asyncio.Event()
        self.problem: FoundryError | None = None

    async def post(self, event: Event | str) -> None:
        self.events.append(event)

    async def read(self) -> list[Event | str]:
        """The news since the last call."""
        news, self.events = self.events, []
        return news

    async def ask_stop(self) -> None:
        self.stop.set()

    async def until_stop(self) -> None:
        """Returns once the driver asked to stop."""
        await self.stop.wait()

    async def fail(self, problem: FoundryError) -> None:
        """A problem that a restart would only meet again."""
        self.problem = self.problem or problem

    async def failed(self) -> FoundryError | None:
        return self.problem
