"""One model source in a replica: its current version, and replaced versions that are finishing their requests.

When an alias moves, the new version is loaded beside the current one and then replaces it; the old engine is closed
when its last lease ends. A version that fails to load is remembered and the current one stays.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from gptcore.engine.async_engine import AsyncEngine
from gptcore.errors import FoundryError, HubError, NoMemory, QueueFull
from gptcore.redact import without_password
from serve_app.errors import ApiError, without_folders
from serve_app.models.crash_record import CrashRecord
from serve_app.models.load import LoadTimeout, MakeEngine, ServedModel, alias_of, load
from serve_app.models.registry import Registry
from serve_app.settings import ServeSettings

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 300.0
PINNED = ""
"""The version of a source without an alias, which has only one."""

OnReload = Callable[[str, bool], None]


class LoadedVersion:
    """A loaded version and the number of its leases."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.leases = 0
        self.free = asyncio.Event()
        self.free.set()

    def acquire(self) -> None:
        """Start a lease."""
        self.leases += 1
        self.free.clear()

    def release(self) -> None:
        """End a lease."""
        self.leases -= 1
        if not self.leases:
            self.free.set()


@dataclass(frozen=True)
class Refusal:
    """Why a version failed to load, the wait before the next attempt in seconds, and its time (monotonic clock)."""

    reason: str
    wait: float
    retry_at: float

    @property
    def in_effect(self) -> bool:
        """Whether it is still too early for another attempt."""
        return time.monotonic() < self.retry_at


def refusal(error: Exception, before: Refusal | None, first_wait: float) -> Refusal:
    """The refusal for an error. Waits double; an error that would repeat, such as a damaged file, is never retried."""
    hopeless = isinstance(error, FoundryError) and not isinstance(error, HubError | NoMemory)
    wait = math.inf if hopeless else min(2 * before.wait if before else first_wait, LONGEST_BACKOFF_S)
    return Refusal(reason_of(error), wait, time.monotonic() + wait)


def reason_of(error: BaseException) -> str:
    """The error as one line for people, with the type's name if it is not one of ours."""
    text = without_password(" ".join(str(error).split()))
    return text if isinstance(error, FoundryError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


class Model:
    """One source and its loaded versions. Belongs to one event loop; blocking calls run in threads.

    `essential`: the service needs it, so a version that crashed a replica is retried soon. `optional`: it is unloaded
    when its alias is removed.
    """

    def __init__(
        self,
        name: str,
        source: str,
        settings: ServeSettings,
        registry: Registry,
        make_engine: MakeEngine,
        essential: bool,
        optional: bool,
    ) -> None:
        self.name = name
        self.source = source
        self.alias = alias_of(source)
        self.loading: str | None = None
        """What is being loaded, and since when."""
        self.on_reload: OnReload = lambda name, succeeded: None
        self.current: LoadedVersion | None = None
        self.error: str | None = None
        """Why nothing is loaded, or why the alias's version is not."""
        self.refused: dict[str, Refusal] = {}
        self.registry_away = False
        self._settings = settings
        self._registry = registry
        self._make_engine = make_engine
        self._essential = essential
        self._optional = optional
        self._crash_record = CrashRecord(source, registry.tracking_uri)
        self._stuck: dict[str, AsyncEngine] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._waiting = 0
        self._tried_at = -math.inf
        self._closing: dict[asyncio.Task[None], LoadedVersion] = {}

    @property
    def state(self) -> str:
        """ready, loading, failed, or unloaded until the first request."""
        if self.current is not None:
            return "ready" if self.current.served.engine.alive else "failed"
        if self._refreshing is not None:
            return "loading"
        return "failed" if self.error else "unloaded"

    @property
    def loaded_versions(self) -> list[LoadedVersion]:
        """The current version, and replaced ones that are still open."""
        return ([self.current] if self.current else []) + list(self._closing.values())

    async def get(self) -> LoadedVersion:
        """The current version, loaded first if there is none; concurrent callers share one load.

        Raises ApiError 503 with the reason if it fails to load, or failed less than `poll_seconds` ago, and QueueFull
        if as many requests wait for the load as the engine will have room for.
        """
        waited = time.monotonic() - self._tried_at
        if self.current is None and (self._refreshing is not None or waited >= self._settings.poll_seconds):
            if self._waiting >= self._settings.places:
                raise QueueFull(
                    f"{self._waiting} requests wait for the model {self.name!r} to load; no more than "
                    f"{self._settings.places} may. Try again later"
                )
            self._waiting += 1
            try:
                await self.refresh()
            finally:
                self._waiting -= 1
        if self.current is None:
            raise ApiError(
                503,
                f"the model {self.name!r} is not ready: {without_folders(str(self.error))}",
                param="model",
                code="model_not_ready",
                headers={"retry-after": str(max(1, math.ceil(self._settings.poll_seconds)))},
            )
        return self.current

    async def refresh(self) -> None:
        """Look up the source's version, and load it unless it is loaded or was refused. Raises nothing.

        Concurrent calls wait for the one that is running; cancelling a caller does not cancel it.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.wait((self._refreshing,))

    async def left(self) -> None:
        """Wait until every replaced version is closed."""
        await asyncio.gather(*self._closing)

    async def close(self) -> None:
        """Cancel a running load, let requests finish, and close every engine."""
        self.error = "the service is closing"
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait((self._refreshing,))
            self._refreshing = None  # a task cancelled before its first step does not do so itself
        self._replace_current(None)
        self._tried_at = math.inf  # so that a late request does not load it again
        await self.left()

    async def _refresh(self) -> None:
        try:
            if self.alias is None:
                if self.current is None:
                    await self._take_first([PINNED], alone=self._essential)
                    self._report(self._reason(PINNED))
                return
            version = await asyncio.to_thread(self._registry.version, *self.alias)
            self.registry_away = False
            if version is None:
                self._report("no version of the registered model {!r} has the alias {!r}".format(*self.alias))
                if self._optional:
                    self._replace_current(None)
            elif self.current is None:
                await self._take_first([version])
                if self.current is None:  # try what was served before, as the other replicas still do
                    await self._take_first([served] if (served := self._crash_record.last_served()) else [])
                if self.current is None:
                    earlier = await asyncio.to_thread(self._registry.earlier_champions, self.alias[0], version)
                    await self._take_first(earlier)
                if self.current is None and self._essential:
                    await self._take_first([version], alone=True)
                self._report(self._reason(version))
            elif version != self.current.served.version:
                if self._may_try(version):
                    await self._follow(version)
                self._report(self._reason(version))
            else:
                self._report(None)
        except Exception as error:  # from the registry; the current version stays
            self.registry_away = True
            self._report(f"cannot ask where {self.source} points: {reason_of(error)}")
        finally:
            self._refreshing, self._tried_at = None, time.monotonic()

    async def _take_first(self, versions: list[str], alone: bool = False) -> None:
        """Load the first of `versions` that loads; `alone`: there is nothing else to serve."""
        for version in versions:
            if self._may_try(version, alone) and (served := await self._start(version)):
                self._replace_current(served)
                return

    async def _follow(self, version: str) -> None:
        """Load `version` beside the current one, then replace that."""
        log.info("%s moves to version %s", self.source, version)
        served = await self._start(version)
        if served:
            self._replace_current(served)
        self.on_reload(self.name, served is not None)

    async def _start(self, version: str) -> ServedModel | None:
        """Load and warm up `version`; None if that fails, which is remembered."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.loading = f"loading version {version} since {since}" if version else f"loading since {since}"
        try:
            with self._crash_record.loading(version):
                served = await load(
                    self.name,
                    self.source,
                    version or None,
                    self._settings.engine_settings,
                    self._registry,
                    make_engine=self._make_engine,
                    seconds=self._settings.load_seconds,
                )
        except Exception as error:  # bad files, no memory, a compiler error: the service must survive them all
            if isinstance(error, LoadTimeout):
                self._stuck[version] = error.engine
            self.refused[version] = refusal(error, self.refused.get(version), self._settings.poll_seconds)
            return None
        finally:
            self.loading = None
        self._crash_record.record_served(version)
        self.refused.pop(version, None)
        info = served.engine.info
        note = f" ({info.note})" if info.note else ""
        log.info("%s is ready%s", served.label, note, extra={"source": served.source, "runner": info.runner})
        return served

    def _may_try(self, version: str, alone: bool = False) -> bool:
        """Whether `version` may be loaded now: neither refused nor the cause of a crash too recently."""
        known = self.refused.get(version)
        if known is not None and known.in_effect:
            return False
        if version in self._stuck:
            if self._stuck[version].at_work:  # a second attempt would hang too
                return False
            del self._stuck[version]
        crashes = self._crash_record.crashes(version)
        if crashes is not None and time.time() < crashes.retry_at(alone):
            self.refused[version] = Refusal(crashes.reason, self._settings.poll_seconds, -math.inf)
            return False
        return True

    def _reason(self, version: str) -> str | None:
        """Why `version` was refused last, if it was."""
        known = self.refused.get(version)
        if known is None:
            return None
        return f"version {version} was refused: {known.reason}" if version else known.reason

    def _replace_current(self, served: ServedModel | None) -> None:
        """Make `served` the current version, and close the previous one when its requests have ended."""
        before, self.current = self.current, LoadedVersion(served) if served else None
        if before is not None:
            task = asyncio.create_task(self._close_version(before))
            self._closing[task] = before
            task.add_done_callback(self._closing.pop)

    async def _close_version(self, loaded: LoadedVersion) -> None:
        await loaded.free.wait()
        await loaded.served.engine.close()
        log.info("%s is closed", loaded.served.label)

    def _report(self, error: str | None) -> None:
        """Remember what is wrong, if anything, and log it if it has changed."""
        if error and error != self.error:
            log.warning("model %s: %s", self.name, error)
        self.error = error
