"""Settings for all tests, and fixtures for data next to the checkout: tiny Shakespeare and GPT-2's vocabulary."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.chance import forget_the_project

settings.load_profile("same")
forget_the_project()

for name in [name for name in os.environ if name.startswith(("GPT_", "HF_", "MLFLOW_", "RAY_"))]:
    del os.environ[name]  # the developer's own settings must not change the tests
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # a token in ~/.ray is not used; tests that need one bring their own
for name in ("no_proxy", "NO_PROXY"):  # our own servers are not reached through a proxy
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a background job; child processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST_FIRST = ("system/test_job_ends.py", "system/test_job.py", "docs/test_commands.py", "system", "docs", "deploy")
"""Test files and folders that take minutes. They start first, so that no process starts a long one last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts long tests first. The order is the same in every run."""

    def rank(item: pytest.Item) -> int:
        where = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((n for n, name in enumerate(LONGEST_FIRST) if where.startswith(name)), len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds all generators, so that a test's random numbers do not depend on the tests before it."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Canonical tiny Shakespeare; skips where it is absent."""
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not beside the checkout")
    return path


@pytest.fixture
def gpt2_cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points TIKTOKEN_CACHE_DIR at GPT-2's real vocabulary; skips where it is absent."""
    path = SHARED / "tiktoken"
    if not path.is_dir():
        pytest.skip("GPT-2's vocabulary is not beside the checkout")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes of text with a pattern to learn."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, take {n % 7} down.\n" for n in range(300)))
    return path
