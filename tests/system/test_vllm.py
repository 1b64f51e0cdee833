"""The service with GPT_ENGINE=vllm, run from .venv-vllm: the real vLLM on a CPU, with a model of random weights.

vLLM takes about a minute to start, and each test but the first two makes it start again.
"""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from gptcore.engine import Engine, EngineSettings, Request
from gptcore.package import Package
from gptcore.sampling import SamplingParams
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, TestRegistry, make_package, registry_in
from tests.system.conftest import ROOT, Cluster, started
from tests.system.serving import QUICK, Load, Service, said, served, title
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BIN = ROOT / ".venv-vllm" / "bin"
PATH = f"{BIN}:{os.environ['PATH']}"
START_SECONDS = 420.0
SHAPE = {"hidden_size": 128, "num_heads": 2, "context_length": 512}
"""vLLM's attention wants heads of at least 32. The embedding has more rows than the tokenizer has ids."""
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Skips the module where vLLM is missing."""
    python = BIN / "python"
    if not python.exists() or subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        pytest.skip("vllm is not installed; make .venv-vllm/installed does that")


@pytest.fixture(scope="module")
def cluster(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers have vLLM."""
    with started(tmp_path_factory.mktemp("home"), bin=BIN, PATH=PATH) as running:
        yield running


@pytest.fixture(scope="module")
def registry(cluster: Cluster, make_package: MakePackage) -> Iterator[TestRegistry]:
    """The embedded MLflow of the cluster's home."""
    with registry_in(cluster.home, make_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(cluster: Cluster, registry: TestRegistry) -> Iterator[Service]:
    """The champion of `large` in vLLM. When it has been stopped, nothing of vLLM may be left."""
    registry.publish("large", seed=1, **SHAPE)
    port = free_port()
    settings: dict[str, Any] = QUICK | {"engine": "vllm", "backend": "auto", "model": "models:/large@champion"}
    command = ["serve_app:build_app", *said(**settings, port=port)]
    with served(cluster, *command, port=port, bin=BIN, seconds=START_SECONDS, PATH=PATH) as running:
        yield running
        [replica] = running.replicas()
        processes = replica.children(recursive=True)
        assert engines(replica)
    await_end(processes)


def engines(replica: psutil.Process) -> list[psutil.Process]:
    """vLLM's engines in a replica, each of which has workers."""
    return [process for process in replica.children() if "EngineCore" in title(process) and runs(process)]


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; its parent may not have noticed yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def await_end(processes: list[psutil.Process]) -> None:
    eventually(lambda: not any(map(runs, processes)), "vLLM's processes have ended", 60)


def prompts() -> list[str]:
    words = random.Random(1)
    return [" ".join(words.choices(("one", "two", "three", "four"), k=words.randint(1, 30))) for _ in range(20)]


def ours(package: Package, texts: list[str]) -> list[list[int]]:
    """What our own engine says in fp32."""
    engine = Engine(package, EngineSettings(slots=4, dtype="float32", backend="torch", threads=1))
    params = SamplingParams(temperature=0, max_new_tokens=TOKENS, ignore_eos=True)
    found: dict[str, list[int]] = {text: [] for text in texts}
    for text in texts:
        engine.add(Request(text, engine.encode(text), params))
        while engine.busy:
            for update in engine.step():
                found[update.request_id] += update.token_ids
    engine.close()
    return list(found.values())


def test_greedy_tokens_are_those_of_our_engine_alone_and_in_a_crowd(service: Service, make_package: MakePackage):
    texts = prompts()
    expected = ours(make_package(1, **SHAPE), texts)
    body = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, "logprobs": 0}

    def tokens(text: str) -> list[int]:
        status, reply = service.ask(body=body | {"prompt": text})
        assert status == 200, reply
        assert reply["usage"]["completion_tokens"] == TOKENS
        return [token["token_id"] for token in reply["choices"][0]["logprobs"]]

    assert [tokens(text) for text in texts] == expected
    with ThreadPoolExecutor(8) as crowd:
        assert list(crowd.map(tokens, texts)) == expected


def test_what_is_not_exact_is_said_in_models(service: Service):
    status, reply = service.ask("/models", None)
    assert status == 200
    [model] = reply["models"]
    assert model["runner"].startswith("vLLM ")
    assert (model["dtype"], model["slots"], model["context_length"]) == ("float32", 4, SHAPE["context_length"])
    assert any(caveat.startswith("seeds:") for caveat in model["caveats"])
    assert model["run_id"]


def test_what_vllm_cannot_do_is_refused(service: Service):
    status, reply = service.ask(body={"prompt": "Once", "temperature": 3})
    assert (status, reply["error"]["param"]) == (400, "temperature"), reply
    body = {"model": "large", "prompt": [5] * SHAPE["context_length"], "max_tokens": 0, "echo": True, "logprobs": 1}
    status, reply = service.ask("/v1/completions", body)
    assert status == 400
    assert f"at most {SHAPE['context_length'] - 1} fit" in reply["error"]["message"]
    status, reply = service.ask("/v1/completions", body | {"prompt": body["prompt"][1:]})
    assert status == 200, reply
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == SHAPE["context_length"] - 1


def test_a_new_version_replaces_the_old_one_under_load_without_a_failed_request(
    service: Service, registry: TestRegistry
):
    before = service.version()
    [replica] = service.replicas()
    [engine] = engines(replica)
    processes = [engine, *engine.children(recursive=True)]
    with Load(service, clients=4) as load:
        eventually(lambda: load.answered(before), "the old version answers")
        after = registry.publish("large", seed=2, **SHAPE)
        eventually(lambda: load.answered(after), "the new version answers", START_SECONDS)
    assert load.failed == {}
    assert after != before
    await_end(processes)


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_when_vllm_or_its_replica_is_killed_nothing_is_left_and_the_replica_is_replaced(service: Service, victim: str):
    [replica] = service.replicas()
    [engine] = engines(replica)
    processes = [replica, engine, *engine.children(recursive=True)]
    (engine if victim == "engine" else replica).kill()
    await_end(processes)
    eventually(lambda: service.replicas() not in ([], [replica]), "there is another replica", 120)
    eventually(service.is_ready, "it is ready", START_SECONDS)
    assert service.ask()[0] == 200
