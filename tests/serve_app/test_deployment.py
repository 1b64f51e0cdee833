"""serve_app.deployment: what Ray is told about replicas, from the settings."""

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.deployment import RaySink, build, warn_of_few_slots
from serve_app.front import haproxy
from serve_app.metrics import METRICS
from serve_app.settings import load_settings


def told(**said: Any) -> Any:
    """Ray's settings of the deployment."""
    return build(load_settings(said, {}))._bound_deployment._deployment_config


def test_serve_run_starts_without_importing_torch():
    code = "import sys, serve_app.deployment; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("local", [True, False])
def test_replicas_use_the_caches_of_the_process_that_starts_them(local: bool):
    options = build(load_settings({}, {}), local=local)._bound_deployment.ray_actor_options
    assert ("GPT_FOUNDRY_HOME" in options["runtime_env"].get("env_vars", {})) == (not local)


@pytest.mark.parametrize(
    ("said", "target"),
    [
        ({}, 11.2),
        ({"slots": 8}, 5.6),
        ({"num_gpus": 1}, 44.8),
        ({"device": "cuda:0"}, 44.8),
        ({"num_gpus": 1, "slots": 100}, 70),
        ({"slots": 8, "target_ongoing_requests": 3}, 3),
        ({"engine": "vllm", "tensor_parallel": 4}, 44.8),
    ],
)
def test_autoscaling_aims_for_seventy_percent_of_the_slots_unless_told_otherwise(said: dict[str, Any], target: float):
    assert told(**said).autoscaling_config.target_ongoing_requests == pytest.approx(target)


@pytest.mark.parametrize("limit", [300.0, 1000.0])
def test_a_request_may_take_its_whole_time_on_a_replica_that_stops_and_in_a_haproxy_that_is_replaced(limit: float):
    assert told(request_timeout_s=limit).graceful_shutdown_timeout_s > limit + haproxy.DRAIN_SECONDS
    environment = {haproxy.SWITCH: "1"}
    haproxy.use_haproxy(environment, request_seconds=limit)
    assert float(environment.get(haproxy.HARD_STOP, "inf")) > limit


def test_a_shorter_time_to_drain_can_be_set():
    assert told(drain_seconds=20).graceful_shutdown_timeout_s == 20


@pytest.mark.parametrize(
    ("said", "slots", "warned"),
    [
        ({"max_replicas": 4}, 6, True),
        ({"max_replicas": 4}, 16, False),
        ({"max_replicas": 4, "target_ongoing_requests": 9}, 6, False),
        ({"max_replicas": 1}, 6, False),
    ],
)
def test_an_engine_with_fewer_slots_than_autoscaling_assumes_is_reported(
    said: dict[str, Any], slots: int, warned: bool, caplog: pytest.LogCaptureFixture
):
    engine = SimpleNamespace(info=SimpleNamespace(slots=slots))
    models: Any = SimpleNamespace(
        settings=load_settings(said, {}), loaded=lambda: [SimpleNamespace(label="gpt@champion v1", engine=engine)]
    )
    with caplog.at_level(logging.WARNING, "serve_app.deployment"):
        warn_of_few_slots(models)
    assert ("gpt@champion v1 has only 6 slots" in caplog.text) is warned
    assert ("set target_ongoing_requests=4.2" in caplog.text) is warned


def test_every_metric_takes_a_zero():
    sink = RaySink()
    for metric in METRICS:
        sink(metric, dict.fromkeys(metric.labels, "x"), 0)
