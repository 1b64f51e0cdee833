"""Loads a model: from its source (a folder, models:/…, runs:/…, hf:… or a URL) to a warm engine, as a `ServedModel`.

`follow.py` decides when, and what happens to the previous version.
"""

import asyncio
import hashlib
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from gptcore.chat import ChatTemplate, chat_template
from gptcore.engine import EngineSettings
from gptcore.engine.async_engine import AsyncEngine
from gptcore.engine.engines import make_engine
from gptcore.engine.interface import Stepped
from gptcore.errors import PackageError
from gptcore.hf_format import count_parameters
from gptcore.hub import resolve
from gptcore.package import MANIFEST, Package, open_package
from gptcore.weights import weight_files
from serve_app.models.registry import Lineage, Registry, lineage

SHORT_HASH = 12
CLOSE_SECONDS = 5.0
"""How long to wait for an abandoned load, which may hang in remote storage."""

MakeEngine = Callable[[Package, EngineSettings], Stepped]


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of a model, ready for requests."""

    name: str
    source: str
    version: str
    """The registry's version number; for other sources, a commit or a hash of the content."""
    alias: str | None
    engine: AsyncEngine = field(repr=False)
    lineage: Lineage = field(repr=False)
    parameters: int
    loaded_at: datetime

    @property
    def package(self) -> Package:
        """Its config, tokenizer and files."""
        return self.engine.package

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How the model wants conversations. Raises PackageError if its template cannot be compiled."""
        return chat_template(self.package.tokenizer)

    @property
    def chats(self) -> bool:
        """Whether it has a chat template that can be used."""
        try:
            return self.chat_template is not None
        except PackageError:
            return False

    @property
    def name_version(self) -> str:
        """Name and version, for the x-model-version header."""
        return f"{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """The name for people, such as `gpt@champion v7`."""
        name = f"{self.name}@{self.alias}" if self.alias and "@" not in self.name else self.name
        return f"{name} v{self.version}"


def alias_of(source: str) -> tuple[str, str] | None:
    """(registered model, alias) for models:/NAME@ALIAS; None for any other source."""
    name, at, alias = source.removeprefix("models:/").partition("@")
    return (name, alias) if at and source.startswith("models:/") else None


class LoadTimeout(TimeoutError):
    """A load that exceeded its time limit. Its thread cannot be stopped and ends by itself, if it does."""

    def __init__(self, message: str, engine: AsyncEngine) -> None:
        super().__init__(message)
        self.engine = engine


@dataclass(frozen=True)
class Opened:
    """A version before it has an engine."""

    package: Package
    lineage: Lineage
    parameters: int
    version: str


async def load(
    name: str,
    source: str,
    version: str | None,
    settings: EngineSettings,
    registry: Registry,
    make_engine: MakeEngine = make_engine,
    seconds: float = math.inf,
) -> ServedModel:
    """Find, verify, load and warm up the model. `version` is the alias's version, for a source with an alias.

    All of it runs in the engine's thread. Raises HubError if the files are unavailable, PackageError or similar if they
    are invalid, LoadTimeout after `seconds`, or what the engine raises. If cancelled, it closes the engine.
    """
    moving = alias_of(source)
    pinned = f"models:/{moving[0]}/{version}" if moving else source
    found: list[Opened] = []

    def make() -> Stepped:
        # Downloads are kept until they are memory-mapped.
        with TemporaryDirectory(prefix="gpt-foundry-", ignore_cleanup_errors=True) as downloads:
            found.append(_open(pinned, version, registry, Path(downloads)))
            return make_engine(found[0].package, settings)

    engine = AsyncEngine(make, name=f"engine {name} {version or ''}".strip())
    try:
        async with asyncio.timeout(seconds if seconds < math.inf else None) as limit:
            await engine.start()
    except BaseException as error:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await engine.close(drain=False)
        if limit.expired():
            raise LoadTimeout(f"the load took longer than load_seconds ({seconds:g})", engine) from error
        raise
    return ServedModel(
        name=name,
        source=source,
        version=found[0].version,
        alias=moving[1] if moving else None,
        engine=engine,
        lineage=found[0].lineage,
        parameters=found[0].parameters,
        loaded_at=datetime.now(UTC),
    )


def _open(pinned: str, version: str | None, registry: Registry, downloads: Path) -> Opened:
    package = open_package(resolve(pinned, registry.tracking_uri, downloads), verify=True)
    numbered = re.fullmatch(r"models:/([^/@]+)/(\d+)", pinned)
    if numbered:
        made_by = registry.lineage(numbered[1], numbered[2])
    else:
        training = package.info.get("training") or {}
        run_id = training.get("run_id")
        made_by = lineage(training, run_id=run_id if isinstance(run_id, str) else None)
    return Opened(package, made_by, count_parameters(package.config), version or _version_of(pinned, package))


def _version_of(pinned: str, package: Package) -> str:
    if pinned.startswith("models:/"):
        return pinned.rpartition("/")[2]
    if pinned.startswith("hf:") and re.fullmatch("[0-9a-f]{40}", package.path.name):
        return package.path.name[:SHORT_HASH]  # the hub's commit
    # A manifest contains every file's hash, so its own hash identifies the whole package.
    files = [package.path / MANIFEST] if package.info else weight_files(package.path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:SHORT_HASH]
