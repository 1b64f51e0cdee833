"""Replicas rise and fall with the load, and no request fails: real Ray Serve, behind both of Ray's fronts.

The replicas' engines are paced (`bench/paced.py`), so that four of them need less than two cores.
"""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from serve_app.front import haproxy
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, make_package
from tests.system.conftest import Cluster, started
from tests.system.serving import BODY, QUICK, Load, Service, in_ray, said, served
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too

pytestmark = [pytest.mark.slow, pytest.mark.release]

STEP_MS = 10
FEWEST, MOST = 2, 4
STREAMS, STREAM_TOKENS = 4, 6000
"""`FEWEST` replicas carry these streams. Each takes a minute, which is longer than it takes until the other
replicas stop, so those have streams to finish then."""
STATES = """
import json; from ray import serve
print(json.dumps(serve.status().applications["default"].deployments["gpt"].replica_states))
"""


@pytest.fixture(scope="module", params=["haproxy", "proxy"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for this module."""
    env = {} if request.param == "haproxy" else {haproxy.SWITCH: "0"}
    haproxy.use_haproxy(env)
    with started(tmp_path_factory.mktemp("home"), **env) as running:
        yield running


@pytest.fixture(scope="module")
def service(cluster: Cluster, make_package: MakePackage) -> Iterator[Service]:
    """Two to four replicas of a small model, that scale within seconds."""
    package = make_package(context_length=8192)
    port = free_port()
    settings = QUICK | {"model": package.path, "port": port, "max_new_tokens": STREAM_TOKENS, "step_ms": STEP_MS}
    settings |= {"min_replicas": FEWEST, "max_replicas": MOST, "upscale_delay_s": 1, "downscale_delay_s": 2}
    with served(cluster, "bench.paced:build_app", *said(**settings), port=port) as running:
        yield running


@dataclass(frozen=True)
class Streamed:
    """The end of a stream."""

    tokens: int
    last: bytes


def stream(service: Service, seed: int) -> Streamed:
    """Reads one long text to its end."""
    body = BODY | {"stream": True, "max_new_tokens": STREAM_TOKENS, "seed": seed}
    request = urllib.request.Request(f"{service.url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        events = [line.removeprefix(b"data: ").strip() for line in answer if line.startswith(b"data:")]
    usage = [json.loads(event) for event in events if b'"usage"' in event]
    return Streamed(usage[-1]["usage"]["completion_tokens"] if usage else 0, events[-1])


def states(service: Service) -> dict[str, int]:
    """The number of replicas in each of Ray's states."""
    return dict(json.loads(in_ray(service.cluster, STATES)))


def test_two_replicas_become_four_under_load_and_two_after_it_and_no_request_fails(service: Service):
    eventually(lambda: states(service) == {"RUNNING": FEWEST}, "two replicas run", 60)
    with Load(service, clients=16, body=BODY | {"max_new_tokens": 100}) as load:
        eventually(lambda: states(service) == {"RUNNING": MOST}, "four replicas run", 120)
        answered = load.answered()
        eventually(lambda: load.answered() > answered + 100, "requests are answered while there are four", 60)
    with ThreadPoolExecutor(STREAMS) as clients, Load(service, clients=1) as light:
        streams = [clients.submit(stream, service, seed) for seed in range(STREAMS)]
        eventually(lambda: states(service).get("STOPPING"), "a replica stops while it has streams", 60)
        assert not any(ended.done() for ended in streams)
        assert [ended.result() for ended in streams] == [Streamed(STREAM_TOKENS, b"[DONE]")] * STREAMS
        eventually(lambda: states(service) == {"RUNNING": FEWEST}, "two replicas are left", 60)
        answered = light.answered()
        eventually(lambda: light.answered() > answered + 10, "requests are answered after it", 60)
    assert load.failed | light.failed == {}
