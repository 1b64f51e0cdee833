"""Small packages of random weights, and an embedded MLflow that has them as versions of registered models."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.config import ModelConfig
from gptcore.hub import resolve
from gptcore.model import GPT
from gptcore.package import WEIGHTS, Package, save_package
from gptcore.tokenizer import load_tokenizer

SHAPE: dict[str, Any] = dict(vocab_size=320, hidden_size=32, num_layers=2, num_heads=2, context_length=128)

MakePackage = Callable[..., Package]


@dataclass(frozen=True)
class TestRegistry:
    """An embedded MLflow in its own home."""

    __test__ = False

    home: Path
    uri: str
    make_package: MakePackage

    @property
    def client(self) -> Any:
        """MLflow's client."""
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def publish(
        self, name: str, seed: int = 0, bits_per_byte: float = 2.0, promote: str = "always", **shape: Any
    ) -> str:
        """Registers a package of random weights as the training job does; returns the version."""
        from train_job.tracking import runs as tracking
        from train_job.tracking.registry import Validation, publish

        data = tracking.DatasetUse("train", "builtin", "builtin", "fe" * 32, 900, 300)
        run_id = tracking.start_run(self.uri, {"preset": "quick"}, datasets=[data])
        judged = Validation("f1", lambda package: bits_per_byte)
        return publish(self.uri, run_id, self.make_package(seed, **shape), judged, name=name, promote=promote).version

    def point(self, name: str, version: str, alias: str = "champion") -> None:
        """Moves the alias."""
        self.client.set_registered_model_alias(name, alias, version)

    def spoil(self, name: str, version: str) -> None:
        """Cuts the version's weights short where they are kept."""
        weights = resolve(f"models:/{name}/{version}", self.uri) / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-100])


@pytest.fixture(scope="session", autouse=True)
def journal_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which replicas in this process record crashes."""
    folder = tmp_path_factory.mktemp("journals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve_app.models.crash_record.home", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def make_package(tmp_path_factory: pytest.TempPathFactory) -> MakePackage:
    """Makes packages with random weights."""
    return package_maker(tmp_path_factory.mktemp("packages"))


def package_maker(folder: Path) -> MakePackage:
    """Makes packages with random weights. Different seeds give different texts. Keyword arguments change the shape."""
    made: dict[Any, Package] = {}

    def make(seed: int = 0, **shape: Any) -> Package:
        key = (seed, *sorted(shape.items()))
        if key not in made:
            config = ModelConfig(**SHAPE | shape)
            generator = torch.Generator().manual_seed(seed)
            state = {
                name: torch.randn(value.shape, generator=generator) * 0.2 + ("norm" in name)
                for name, value in GPT(config).state_dict().items()
            }
            if config.tie_embeddings:
                state["lm_head.weight"] = state["embed_tokens.weight"]
            training = {"bits_per_byte": 2.5, "data_fingerprint": "fe" * 32, "run_id": "0" * 32}
            made[key] = save_package(folder / f"{len(made)}", config, state, load_tokenizer("bytes"), training)
        return made[key]

    return make


@pytest.fixture(scope="session")
def package(make_package: MakePackage) -> Package:
    """A qwen3 of two layers with the byte tokenizer."""
    return make_package()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, make_package: MakePackage) -> Iterator[TestRegistry]:
    """An empty registry. Each test uses its own model names."""
    with registry_in(tmp_path_factory.mktemp("home"), make_package) as opened:
        yield opened


@contextmanager
def registry_in(home: Path, make_package: MakePackage, uri: str = "") -> Iterator[TestRegistry]:
    """The registry at `uri`, or the embedded one of this home. Undoes MLflow's changes to the process afterwards."""
    import mlflow

    names = ("GPT_FOUNDRY_HOME", "MLFLOW_TRACKING_URI")
    before = {name: os.environ.pop(name, None) for name in names}
    (home / "mlflow").mkdir(parents=True, exist_ok=True)
    yield TestRegistry(home, uri or f"sqlite:///{home}/mlflow/mlflow.db", make_package)
    mlflow.set_tracking_uri(None)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests run in asyncio's loop."""
    return "asyncio"
