"""All models of a replica, by name: leases for requests, and the status of each model.

A lease keeps its version loaded, however often the registry's aliases move meanwhile. A source is loaded once, even if
it has several names. Everything here belongs to one event loop.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from gptcore.engine.engines import make_engine
from gptcore.errors import EngineError, did_you_mean
from gptcore.home import default_tracking_uri
from gptcore.redact import without_password
from serve_app.errors import ApiError, without_folders
from serve_app.models.follow import Model, OnReload
from serve_app.models.load import MakeEngine, ServedModel
from serve_app.models.registry import Registry
from serve_app.settings import ALL, ServeSettings

__all__ = ["ModelStatus", "Models", "ServedModel"]

START_PATIENCE_S = 30.0
"""How long a starting replica waits for an unreachable registry before it accepts requests without its model."""


@dataclass(frozen=True)
class ModelStatus:
    """The status of one model. Facts known only for loaded models are None for others."""

    name: str
    source: str
    state: str
    """ready, loading, failed, or unloaded until the first request."""
    default: bool
    canary_share: float | None
    error: str | None
    """Why it is not loaded, or why its alias's version is not."""
    refused: dict[str, str]
    """Versions that failed to load, and why."""
    loading: str | None = None
    """What is being loaded, and since when; another version may be serving meanwhile."""
    version: str | None = None
    alias: str | None = None
    loaded_at: str | None = None
    """ISO 8601, UTC."""
    parameters: int | None = None
    family: str | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    runner: str | None = None
    dtype: str | None = None
    weights: str | None = None
    """int8 or int4 if its matrices are quantised."""
    slots: int | None = None
    chat: bool | None = None
    """Whether it answers conversations: whether it has a chat template that can be used."""
    caveats: tuple[str, ...] = ()
    """What its engine does less exactly than our own."""
    run_id: str | None = None
    run_url: str | None = None
    bits_per_byte: float | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    git_commit: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


class Models:
    """All models of a service, including the canary. Nothing is loaded before `start`."""

    def __init__(
        self, settings: ServeSettings, registry: Registry | None = None, make_engine: MakeEngine = make_engine
    ) -> None:
        self.settings = settings
        self.default = settings.default_model
        self._canary = settings.canary_share
        self._canary_name = settings.canary_name
        listed = settings.sources
        sources = dict(listed)
        if self._canary:
            sources.setdefault(self._canary_name, self._canary.source)
        registry = registry or Registry(settings.tracking_uri or default_tracking_uri())
        by_source: dict[str, Model] = {}
        for name, source in sources.items():
            if source not in by_source:
                by_source[source] = Model(
                    name,
                    source,
                    settings,
                    registry,
                    make_engine,
                    essential=source == listed[self.default],
                    optional=source not in listed.values(),
                )
        self._models = {name: by_source[source] for name, source in sources.items()}
        self._sources = list(by_source.values())
        named_eager = sources if ALL in settings.eager else settings.eager
        eager = [self.default, *named_eager, *([self._canary_name] if self._canary else [])]
        self._eager = [model for model in self._sources if model in [self._models[name] for name in eager]]
        self._watching: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded and its engine alive."""
        return self._models[self.default].state == "ready"

    def on_reload(self, call: OnReload) -> None:
        """Register `call(name, succeeded)`, to be called after every attempt to load an alias's new version."""
        for model in self._sources:
            model.on_reload = call

    async def start(self) -> None:
        """Load the eager models, then watch their sources. Raises nothing.

        If the registry does not answer, wait up to `START_PATIENCE_S` for the default model, so that a new replica
        does not refuse requests that other replicas could answer.
        """
        await asyncio.gather(*(model.refresh() for model in self._eager))
        default = self._models[self.default]
        try:
            async with asyncio.timeout(START_PATIENCE_S):
                while default.current is None and default.registry_away:
                    await asyncio.sleep(min(1.0, self.settings.poll_seconds))
                    await default.refresh()
        except TimeoutError:
            pass
        self._watching = [asyncio.create_task(self._watch(model)) for model in self._sources]

    async def poll(self) -> None:
        """Check each watched source once, as happens every `poll_seconds`."""
        await asyncio.gather(*(model.refresh() for model in self._sources if self._wanted(model)))

    @asynccontextmanager
    async def lease(self, name: str | None, request_id: str) -> AsyncIterator[ServedModel]:
        """The model for a request, kept loaded until the context is left.

        The canary gets its share of the default model's requests. Raises ApiError 404 for an unknown name, and 503 for
        a model that is not ready.
        """
        name = self._choose(name, request_id)
        loaded = await self._models[name].get()
        loaded.acquire()
        try:
            yield replace(loaded.served, name=name)
        finally:
            loaded.release()

    def loaded(self) -> list[ServedModel]:
        """Every version with an engine, once per name, including replaced versions that are finishing requests."""
        return [
            replace(loaded.served, name=name)
            for name, model in self._models.items()
            for loaded in model.loaded_versions
        ]

    def status(self, name: str) -> ModelStatus:
        """The status of one model. Raises ApiError 404 for an unknown name."""
        if name not in self._models:
            raise self._unknown(name)
        return self._status(name, self._models[name])

    def describe(self) -> list[ModelStatus]:
        """The status of each model, the default model first."""
        return [self._status(name, model) for name, model in self._models.items()]

    def check_health(self) -> None:
        """Raises EngineError if the engine of a current version has died."""
        for model in self._sources:
            if model.current is not None and not model.current.served.engine.alive:
                raise EngineError(f"the engine of {model.current.served.label} has died")

    async def left(self) -> None:
        """Wait until every replaced version is closed."""
        await asyncio.gather(*(model.left() for model in self._sources))

    async def close(self) -> None:
        """Stop watching, let requests finish, and close every engine."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self._sources))

    async def _watch(self, model: Model) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            if self._wanted(model):
                await model.refresh()

    def _wanted(self, model: Model) -> bool:
        return model.current is not None or model in self._eager

    def _unknown(self, name: str) -> ApiError:
        near = did_you_mean(name[:64], self._models)
        message = f"there is no model {name[:64]!r}; there are {', '.join(self._models)}.{near}"
        return ApiError(404, message, param="model", code="model_not_found")

    def _choose(self, name: str | None, request_id: str) -> str:
        if name is not None and name not in self._models:
            raise self._unknown(name)
        if self._canary is None or (name or self.default) != self.default:
            return name or self.default
        ready = self._models[self._canary_name].state == "ready"
        return self._canary_name if ready and share_of(request_id) < self._canary.share else self.default

    def _status(self, name: str, model: Model) -> ModelStatus:
        status = ModelStatus(
            name=name,
            source=without_folders(without_password(model.source)),
            state=model.state,
            default=name == self.default,
            canary_share=self._canary.share if self._canary and name == self._canary_name else None,
            error=without_folders(model.error) if model.error else None,
            refused={v: without_folders(refusal.reason) for v, refusal in model.refused.items() if v},
            loading=model.loading,
        )
        if model.current is None:
            return status
        served = model.current.served
        config, info, lineage = served.package.config, served.engine.info, served.lineage
        return replace(
            status,
            version=served.version,
            alias=served.alias,
            loaded_at=served.loaded_at.isoformat(timespec="seconds"),
            parameters=served.parameters,
            family=config.family,
            context_length=info.context_length,
            vocab_size=served.package.tokenizer.vocab_size,
            runner=info.runner,
            dtype=info.dtype,
            weights=info.weights or None,
            slots=info.slots,
            chat=served.chats,
            caveats=info.caveats,
            run_id=lineage.run_id,
            run_url=lineage.run_url,
            bits_per_byte=lineage.bits_per_byte,
            data=without_folders(lineage.data) if lineage.data else None,
            data_fingerprint=lineage.data_fingerprint,
            git_commit=lineage.git_commit,
            tags={name: without_folders(value) for name, value in lineage.tags.items()},
        )


def share_of(request_id: str) -> float:
    """A number in [0, 1) that depends on the id only, uniformly distributed over ids."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) / 2**64
