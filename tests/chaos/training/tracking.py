"""Tracking servers that fail while a run writes to them."""

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tests.chaos.fault import Result
from tests.chaos.gate import Gate, every, garbage, needs, slow, status
from tests.chaos.training.site import Site, ended, finished
from tests.system.tracking import TrackingServer
from tests.waiting import eventually

OUTAGE_SECONDS = 8.0
PREFIX = "/tracking"
"""As behind a proxy that serves other things, too."""


@contextlib.contextmanager
def tracking_server(site: Site) -> Iterator[Gate]:
    """A tracking server behind a gate, which adds a path."""
    folder = site.scratch / site.name("server")
    folder.mkdir()
    server = TrackingServer(folder)
    server.start()
    try:
        server.await_answer()
        with Gate(server.port, PREFIX) as gate:
            yield gate
    finally:
        server.kill()


def tracking(site: Site, rng: random.Random) -> Result:
    """The tracking server fails in several ways, or its database is locked by another writer, for some seconds."""
    reference, result = site.reference(), Result(unit="steps")
    with tracking_server(site) as gate:
        ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "away": gate.away,
            "answering 500": lambda: gate.failing(status(500)),
            "answering garbage": lambda: gate.failing(garbage),
            "30 s late": lambda: gate.failing(slow(30)),
            "failing every third call": lambda: gate.failing(every(3, status(503))),
            "locked": lambda: locked(site),
        }
        for way, fails in ways.items():
            env = {} if way == "locked" else {"MLFLOW_TRACKING_URI": gate.uri}
            run = site.launch(site.name("tracked"), **env)
            run.await_step(rng.randint(5, 60))
            before, met, until = run.step, gate.failed, time.monotonic() + OUTAGE_SECONDS
            with fails():
                eventually(lambda run=run, until=until: run.ended or time.monotonic() > until, "the outage ends", 60)
            result.expect(run.step > before, f"with the server {way} it took no step")
            result.expect(way in ("away", "locked") or gate.failed > met, f"nothing was sent to the server {way}")
            moment = time.monotonic()
            finished(result, run, reference)
            result.recovery.append(time.monotonic() - moment)
            result.times += 1
    return result


@contextlib.contextmanager
def locked(site: Site) -> Iterator[None]:
    """Within the block, another writer holds the database of the home's own MLflow."""
    with contextlib.closing(sqlite3.connect(site.home / "mlflow" / "mlflow.db", timeout=60)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.rollback()


def tracking_gone(site: Site, rng: random.Random) -> Result:
    """In the middle of a run the server goes, or takes another password only; a resume finds or has the right one."""
    reference, result = site.reference(), Result(unit="steps")
    with tracking_server(site) as gate:
        for way in ("away", "expired"):
            before, after = account("first"), account("second")
            with gate.failing(needs(**before)):
                run = site.launch(site.name("untracked"), MLFLOW_TRACKING_URI=gate.uri, **credentials(before))
                run.await_step(rng.randint(5, 60))
            with gate.away() if way == "away" else gate.failing(needs(**after)):
                ended(result, run, f"the tracking server: {way}")
                result.expect("--resume" in run.output, f"it does not say how to go on: {run.output[-300:]}")
            moment = time.monotonic()
            with gate.failing(needs(**after)):
                run = site.resume(run, MLFLOW_TRACKING_URI=gate.uri, **credentials(after))
                run.finish()
            finished(result, run, reference)  # reads what the server has without a password
            result.recovery.append(time.monotonic() - moment)
            result.times += 1
    return result


def account(password: str) -> dict[str, str]:
    return {"user": "trainer", "password": password}


def credentials(account: dict[str, str]) -> dict[str, str]:
    return {"MLFLOW_TRACKING_USERNAME": account["user"], "MLFLOW_TRACKING_PASSWORD": account["password"]}
