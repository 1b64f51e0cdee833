"""The service on Ray Serve: one service on one cluster, and clients over HTTP.

Each test runs with both of Ray's fronts: HAProxy, the default of `serve run`, and Ray's own proxy.
Versions are published by the training job's own registry code, into the embedded MLflow that the replicas watch.
"""

import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from serve_app.front import haproxy
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, TestRegistry, make_package, registry_in
from tests.system.conftest import Cluster, started
from tests.system.serving import (
    BODY,
    QUICK,
    Load,
    Service,
    await_figures,
    family,
    in_ray,
    name_of,
    said,
    served,
    title,
)
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too

REQUEST_TIMEOUT_S = 12
LONG = BODY | {"max_new_tokens": 8000}
"""More than there is time for."""
SHAPE = {"hidden_size": 128, "num_layers": 4, "context_length": 8192}
FIRST_TOKEN = "gpt_time_to_first_token_seconds_bucket{"


@pytest.fixture(
    scope="module", params=["haproxy", pytest.param("proxy", marks=[pytest.mark.slow, pytest.mark.release])]
)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for this module."""
    env = {} if request.param == "haproxy" else {haproxy.SWITCH: "0"}
    haproxy.use_haproxy(env)
    with started(tmp_path_factory.mktemp("home"), **env) as running:
        yield running


@pytest.fixture(scope="module")
def registry(cluster: Cluster, make_package: MakePackage) -> Iterator[TestRegistry]:
    """The embedded MLflow of the cluster's home."""
    with registry_in(cluster.home, make_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(cluster: Cluster, registry: TestRegistry) -> Iterator[Service]:
    """The champion of `served`, one to three replicas that scale within seconds."""
    registry.publish("served", seed=1, **SHAPE)
    port = free_port()
    settings = QUICK | {"model": "models:/served@champion", "port": port, "request_timeout_s": REQUEST_TIMEOUT_S}
    settings |= {"max_new_tokens": LONG["max_new_tokens"]}
    settings |= {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 3}
    with served(cluster, "serve_app:build_app", *said(**settings), port=port) as running:
        yield running


def test_the_front_is_the_chosen_one(service: Service, request: pytest.FixtureRequest):
    def is_there() -> bool:
        return "haproxy" in {name_of(process) for process in family(service.cluster)}

    if request.node.callspec.params["cluster"] == "haproxy":
        eventually(is_there, "HAProxy is there: one that is just being replaced has no name")
    else:
        assert not is_there()


def test_replicas_and_the_front_get_their_share_of_a_busy_machine(service: Service):
    names = ("haproxy", "ServeReplica", "HAProxyManager", "ProxyActor", "ServeController")
    found = []
    for process in family(service.cluster):
        with contextlib.suppress(psutil.NoSuchProcess):  # HAProxy's old process ends after each reload
            if any(name in title(process) for name in names):
                found.append(process.nice())
    assert len(found) >= 3
    assert set(found) == {psutil.Process().nice()}


def test_the_champion_answers_with_its_name_and_version(service: Service, registry: TestRegistry):
    status, reply = service.ask()
    assert status == 200
    assert reply["model"] == "served"
    assert reply["version"] == str(registry.client.get_model_version_by_alias("served", "champion").version)
    assert reply["usage"]["completion_tokens"] == BODY["max_new_tokens"]
    listed = service.ask("/models", None)[1]["models"]
    assert [(entry["name"], entry["state"], entry["bits_per_byte"]) for entry in listed] == [("served", "ready", 2.0)]


def test_a_stream_arrives_while_it_is_computed(service: Service):
    await_one_replica(service)  # the one that is asked for its figures is the one at work
    body = BODY | {"stream": True, "max_new_tokens": 1000}
    request = urllib.request.Request(f"{service.url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-model-version"].startswith("served/")
        assert answer.readline().startswith(b"data:")
        assert running(service) == 1
        assert sum(line.startswith(b"data:") for line in answer) > 5


def test_a_refusal_has_the_apis_error_form(service: Service):
    status, reply = service.ask(body={"prompt": "Once", "max_new_tokens": -1})
    assert status == 400
    assert reply["error"]["param"] == "max_new_tokens"
    status, reply = service.ask("/nowhere", None)
    assert (status, reply["error"]["code"]) == (404, "route_not_found")


def test_both_exporters_have_the_metrics(service: Service, cluster: Cluster):
    service.version()
    with urllib.request.urlopen(f"{service.url}/metrics", timeout=30) as answer:
        assert b'gpt_generation_tokens_total{model="served"' in answer.read()
    await_figures(cluster, ("gpt_generation_tokens_total{", "gpt_slots{", FIRST_TOKEN))


def test_a_client_that_leaves_frees_its_slot_whatever_headers_it_sent(service: Service):
    await_one_replica(service)  # the one that is asked for its figures is the one at work
    for headers in ({}, {"x-request-disconnect-disabled": "?1"}):
        request = urllib.request.Request(
            f"{service.url}/generate", json.dumps(LONG | {"stream": True}).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            assert running(service) == 1
        eventually(lambda: running(service) == 0, "the slot is free", REQUEST_TIMEOUT_S / 2)


def await_one_replica(service: Service) -> None:
    """Waits until the extra replicas of earlier load are gone."""
    eventually(lambda: len(service.replicas()) == 1, "what earlier load raised has fallen", 90)


def running(service: Service) -> float:
    """Sequences that hold a slot, as the one replica says."""
    with urllib.request.urlopen(f"{service.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("gpt_num_requests_running{"))


def test_a_clients_headers_lift_no_limit(service: Service):
    """Streams that would go on longer are ended when their time is up, whatever the clients say."""
    timeouts = [{"x-request-timeout-seconds": "0"}, {"x-request-timeout-seconds": "1000"}]
    others = [{"x-request-disconnect-disabled": "?1"}, {"serve_multiplexed_model_id": "other"}]

    def last_event(headers: dict[str, str]) -> tuple[Any, float]:
        body = json.dumps(LONG | {"stream": True}).encode()
        begun = time.monotonic()
        with urllib.request.urlopen(urllib.request.Request(f"{service.url}/generate", body, headers)) as answer:
            events = [line for line in answer if line.startswith(b"data:")]
        return json.loads(events[-1].removeprefix(b"data:")), time.monotonic() - begun

    with ThreadPoolExecutor() as clients:
        ends = list(clients.map(last_event, timeouts + others))
    assert [event["error"]["code"] for event, _ in ends] == ["timeout"] * 4
    assert all(REQUEST_TIMEOUT_S <= seconds < REQUEST_TIMEOUT_S + 60 for _, seconds in ends)


def test_a_promotion_under_load_fails_no_request_and_takes_effect_within_seconds(
    service: Service, registry: TestRegistry
):
    before = service.version()
    with Load(service, clients=4) as load:
        eventually(lambda: load.answered(before) > 20, "the old version answers", 60)
        version = registry.publish("served", seed=2, **SHAPE)
        eventually(lambda: load.answered(version), "the new version answers", 120)
        eventually(lambda: set(load.latest) == {version}, "the new version alone answers", 60)
    assert load.failed == {}
    assert {entry["version"] for entry in service.ask("/models", None)[1]["models"]} == {version}


def test_a_broken_version_under_load_is_refused_and_reported_and_fails_no_request(
    service: Service, registry: TestRegistry
):
    before = str(registry.client.get_model_version_by_alias("served", "champion").version)
    broken = registry.publish("served", seed=3, promote="never", **SHAPE)
    registry.spoil("served", broken)

    def refused() -> str:
        return str(service.ask("/models", None)[1]["models"][0]["refused"].get(broken, ""))

    with Load(service, clients=2) as load:
        registry.point("served", broken)
        reason = eventually(refused, "the broken version is refused", 30)
        answered = load.answered()
        eventually(lambda: load.answered() > answered + load.latest.maxlen, "requests go on being answered", 60)
    assert load.failed == {}
    assert load.answered(broken) == 0
    assert set(load.latest) == {before}
    assert "altered or cut short" in reason
    registry.point("served", before)


@pytest.mark.slow
def test_replicas_scale_up_under_load_and_down_after_it_without_a_failed_request(service: Service):
    await_one_replica(service)
    with Load(service, clients=8, body=BODY | {"max_new_tokens": 40}) as load:
        eventually(lambda: len(service.replicas()) > 1, "replicas rise", 60)
        answered = load.answered()
        eventually(lambda: load.answered() > answered + 50, "requests are answered while there are more", 120)
    with Load(service, clients=1) as light:
        eventually(lambda: len(service.replicas()) == 1, "replicas fall", 120)
        answered = light.answered()
        eventually(lambda: light.answered() > answered + 10, "requests are answered after it", 60)
    assert load.failed | light.failed == {}


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced(service: Service):
    (replica,) = eventually(lambda: len(service.replicas()) == 1 and service.replicas(), "one replica is there", 60)
    replica.kill()
    psutil.wait_procs([replica], timeout=10)
    eventually(service.is_ready, "another replica is ready", 90)
    assert replica.pid not in [other.pid for other in service.replicas()]
    assert service.version()


BURST = """
import ctypes, threading
def burst(replica):
    for thread in threading.enumerate():
        if thread.name.startswith("engine"):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(RuntimeError))
actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#gpt#" in actor["name"]]
ray.get([ray.get_actor(**actor).__ray_call__.remote(burst) for actor in actors])
"""
"""Throws an exception into every engine's thread, as a fault of its code would."""


@pytest.mark.slow
def test_a_replica_whose_engine_died_is_replaced(service: Service):
    (replica,) = eventually(lambda: len(service.replicas()) == 1 and service.replicas(), "one replica is there", 60)
    in_ray(service.cluster, BURST)
    assert service.ask()[0] == 503  # the exception comes when the thread wakes
    eventually(lambda: not replica.is_running(), "the replica is taken away", 60)
    eventually(service.is_ready, "another replica is ready", 90)
    assert service.version()
