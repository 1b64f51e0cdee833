"""The real service in this process, for tests that speak HTTP to it: uvicorn on a free port, in a thread."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import uvicorn

from gptcore.engine.async_engine import AsyncEngine
from gptcore.engine.engine import Engine, EngineStats
from serve_app.http.app import create_api
from serve_app.models.catalog import Models
from serve_app.models.load import MakeEngine
from serve_app.settings import ServeSettings
from tests.waiting import DEADLINE_SECONDS


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    url: str
    models: Models

    @property
    def engine(self) -> AsyncEngine:
        """Of the default model, if it is loaded."""
        return self.models.loaded()[0].engine

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    @property
    def leases(self) -> int:
        """Requests that hold the default model."""
        held = self.models._models[self.models.default].current
        return held.leases if held else 0


@contextmanager
def running(settings: ServeSettings, make_engine: MakeEngine = Engine) -> Iterator[Running]:
    """Starts the service, waits until it is ready, and stops it."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    services: list[Running] = []
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        models = Models(settings, make_engine=make_engine)
        await models.start()
        services.append(Running(url, models))
        servers.append(uvicorn.Server(uvicorn.Config(create_api(settings, models), log_config=None)))
        await servers[0].serve(sockets=[listener])
        await models.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        reply = httpx2.get(f"{url}/ready", timeout=500)  # waits in the backlog until there is a server
        assert reply.status_code == 200, reply.text
        yield services[0]
    finally:
        if servers:
            servers[0].should_exit = True
        thread.join(DEADLINE_SECONDS)
