"""From a model's source to an engine that answers.

In come a source (a folder, models:/…, runs:/… or hf:…) and the engine's settings; out comes a `ServedModel`: the
package found, verified, loaded and warm. Who asks, and what happens to the version before, is
`models.py`'s business.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from gptcore.engine import EngineSettings
from gptcore.engine.engine import Engine
from gptcore.engine.thread import AsyncEngine
from gptcore.hub import resolve
from gptcore.package import MANIFEST, Package, open_package, weight_files
from gptcore.published import empty_model
from serve_app.registry import Lineage, Registry, lineage

SHORT_HASH = 12

MakeEngine = Callable[[Package, EngineSettings], Engine]


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of a model, ready to be asked."""

    name: str
    source: str
    version: str
    """The registry's number; for other sources, what stands for the content: a commit or a hash."""
    alias: str | None
    engine: AsyncEngine = field(repr=False)
    lineage: Lineage = field(repr=False)
    parameters: int
    loaded_at: datetime

    @property
    def package(self) -> Package:
        """Its config, tokenizer and files."""
        return self.engine.package

    @property
    def label(self) -> str:
        """For people: `gpt@champion v7`."""
        name = f"{self.name}@{self.alias}" if self.alias and "@" not in self.name else self.name
        return f"{name} v{self.version}"


def alias_of(source: str) -> tuple[str, str] | None:
    """(registered model, alias) for models:/NAME@ALIAS; None for a source that cannot move."""
    name, at, alias = source.removeprefix("models:/").partition("@")
    return (name, alias) if at and source.startswith("models:/") else None


async def load(
    name: str,
    source: str,
    version: str | None,
    settings: EngineSettings,
    registry: Registry,
    make_engine: MakeEngine = Engine,
) -> ServedModel:
    """Finds, verifies, loads and warms the model. `version` is where the alias points, for a source with one.

    Raises HubError if the files cannot be had, PackageError and its like if they are no good, or what the engine
    raises. Cancelled, it leaves no engine behind.
    """
    moving = alias_of(source)
    pinned = f"models:/{moving[0]}/{version}" if moving else source
    with TemporaryDirectory(prefix="gpt-foundry-", ignore_cleanup_errors=True) as downloads:  # until it is in memory
        package, made_by, parameters = await asyncio.to_thread(_open, pinned, registry, Path(downloads))
        engine = AsyncEngine(lambda: make_engine(package, settings), name=f"engine {name} {version or ''}".strip())
        try:
            await engine.start()
        except BaseException:
            await engine.close(drain=False)
            raise
        version = version or _version_of(pinned, package)
    return ServedModel(
        name=name,
        source=source,
        version=version,
        alias=moving[1] if moving else None,
        engine=engine,
        lineage=made_by,
        parameters=parameters,
        loaded_at=datetime.now(UTC),
    )


def _open(pinned: str, registry: Registry, downloads: Path) -> tuple[Package, Lineage, int]:
    package = open_package(resolve(pinned, registry.tracking_uri, downloads), verify=True)
    found = re.fullmatch(r"models:/([^/@]+)/(\d+)", pinned)
    if found:
        made_by = registry.lineage(found[1], found[2])
    else:
        training = package.info.get("training") or {}
        made_by = lineage(training, run_id=training.get("run_id"))
    return package, made_by, empty_model(package.config).num_parameters()


def _version_of(pinned: str, package: Package) -> str:
    if pinned.startswith("models:/"):
        return pinned.rpartition("/")[2]
    if pinned.startswith("hf:") and re.fullmatch("[0-9a-f]{40}", package.path.name):
        return package.path.name[:SHORT_HASH]  # the hub's commit
    # A manifest names every file by its hash, so its own hash stands for all of them.
    files = [package.path / MANIFEST] if package.info else weight_files(package.path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:SHORT_HASH]
