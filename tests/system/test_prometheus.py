"""Monitoring: a real Prometheus with our config scrapes a Ray that trains and serves at the same time."""

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve_app.front import haproxy
from tests.deploy.test_watching import PROMETHEUS, rules, shown
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, TestRegistry, make_package, registry_in
from tests.system.conftest import ROOT, SMALL, Cluster, Job, environment, started
from tests.system.serving import QUICK, Load, Service, said, served
from tests.waiting import eventually
from train_job.cluster.exporter import FIGURES

__all__ = ["make_package"]  # a fixture, used here too

pytestmark = pytest.mark.slow

SECONDS = 60.0
NOT_ON_A_CPU = {"ray_gpt_training_mfu_ratio": "nobody knows a CPU's peak, so there is no share of it"}
TOKENS_PER_STEP = 8 * 64  # SMALL's batch and context
LOGGED = {"gpt_training_loss": "train/loss", "gpt_training_validation_loss": "val/loss"}


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, queried as Grafana does."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of a reply of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> dict[str, float]:
        """The expression's values now, under what tells its series apart: a run, a model, a status..."""
        found = self.get("query", query=expression)["result"]
        names = ("run", "model", "status", "version", "outcome")
        labels = (" ".join(one["metric"][name] for name in names if name in one["metric"]) for one in found)
        return dict(zip(labels, (float(one["value"][1]) for one in found), strict=True))

    def alerts(self, *states: str) -> set[str]:
        """The alerts that are in one of these states."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] in states}


@contextlib.contextmanager
def watching(cluster: Cluster, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with deploy/prometheus, looking every second at the cluster's own list of exporters."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian's package is called prometheus)")
    written = (PROMETHEUS / "prometheus.yml").read_text()
    replaced = written.replace("/tmp/ray/", f"{cluster.temp}/").replace("_interval: 10s", "_interval: 1s")
    assert (replaced.count(str(cluster.temp)), replaced.count("_interval: 1s")) == (1, 3)
    (folder / "prometheus.yml").write_text(replaced)
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    address, log = f"127.0.0.1:{free_port()}", folder / "log"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with log.open("w") as said_there:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=said_there, stderr=said_there)
    prometheus = Prometheus(f"http://{address}")

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return bool(prometheus.get("targets")["activeTargets"])
        return False

    try:
        eventually(answers, "Prometheus knows what to scrape", SECONDS)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this module's own, whose workers tell its exporters their figures every second."""
    env = {"RAY_metrics_report_interval_ms": "1000"}
    haproxy.use_haproxy(env)
    with started(tmp_path_factory.mktemp("home"), **env) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watching(cluster, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


@pytest.fixture(scope="module")
def registry(cluster: Cluster, make_package: MakePackage) -> Iterator[TestRegistry]:
    with registry_in(cluster.home, make_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(cluster: Cluster, registry: TestRegistry, prometheus: Prometheus) -> Iterator[Service]:
    """One replica, which has followed its alias to a second version."""
    registry.publish("served", seed=1)
    port = free_port()
    settings = QUICK | {"model": "models:/served@champion", "port": port}
    with served(cluster, "serve_app:build_app", *said(**settings), port=port) as running:
        second = registry.publish("served", seed=2)
        eventually(lambda: running.version() == second, "the service follows its alias", SECONDS)
        yield running


@pytest.fixture(scope="module")
def job(cluster: Cluster, prometheus: Prometheus, text_file: Path) -> Iterator[Job]:
    """A run in progress."""
    flags = [*SMALL, f"--data={text_file}", "--name=watched", "--max-steps=100000", "--schedule=wsd"]
    process = subprocess.Popen(
        [sys.executable, "train_job/run.py", *flags],
        cwd=ROOT,
        env=environment(cluster.home, RAY_ADDRESS=cluster.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = Job(process, cluster.home / "runs" / "watched", f"sqlite:///{cluster.home}/mlflow/mlflow.db")
    try:
        begun.await_line(r"step +20 \| validation")
        yield begun
    finally:
        process.kill()
        process.wait()


def test_every_expression_of_the_dashboard_has_a_value(prometheus: Prometheus, service: Service, job: Job):
    possible = [expression for expression in shown() if not any(name in expression for name in NOT_ON_A_CPU)]
    assert len(possible) == len(shown()) - len(NOT_ON_A_CPU)

    def without() -> list[str]:
        found = {expression: prometheus.values(expression).values() for expression in possible}
        return [expression for expression, values in found.items() if not any(map(math.isfinite, values))]

    with Load(service, 1):
        try:
            eventually(lambda: not without(), "every panel shows something", SECONDS)
        except AssertionError:
            assert without() == []  # which names them
    assert prometheus.values("max by (run) (ray_gpt_training_step)").keys() == {"watched"}
    assert prometheus.values("max by (model) (ray_gpt_slots)") == {"served": QUICK["slots"]}
    assert not any(prometheus.values(name) for name in NOT_ON_A_CPU)


def test_prometheus_scrapes_all_of_rays_targets_and_accepts_all_rules(
    prometheus: Prometheus, service: Service, job: Job
):
    targets = prometheus.get("targets")["activeTargets"]
    assert len(targets) >= 2  # the node's and the dashboard's
    eventually(lambda: set(prometheus.values("up").values()) == {1.0}, "every target is up", SECONDS)
    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in rules()}
    eventually(
        lambda: all(rule["health"] == "ok" for group in prometheus.get("rules")["groups"] for rule in group["rules"]),
        "every rule was evaluated",
        SECONDS,
    )
    # At the first look nothing has moved yet.
    eventually(lambda: "TrainingStalled" not in prometheus.alerts("pending"), "no alert is pending", SECONDS)
    assert not prometheus.alerts("firing")


def test_requests_are_counted_one_by_one(prometheus: Prometheus, service: Service):
    labels = ('route="/generate"', 'status="200"')

    def counted() -> float:
        return sum(prometheus.values(f"sum by (model) (ray_gpt_requests_total{{{','.join(labels)}}})").values())

    def told() -> float:
        """The replica's own metrics."""
        with urllib.request.urlopen(f"{service.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        counters = [line for line in lines if line.startswith("gpt_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in counters if all(label in line for label in labels))

    before = told()
    assert before > 0
    eventually(lambda: counted() == before, "what the replica counts is what Prometheus has", SECONDS)
    for _ in range(7):
        assert service.ask()[0] == 200
    assert told() == before + 7
    eventually(lambda: counted() == before + 7, "seven requests are seven more", SECONDS)


def test_a_refused_version_raises_an_alert_at_once(prometheus: Prometheus, service: Service, registry: TestRegistry):
    spoiled = registry.publish("served", seed=3, promote="never")
    registry.spoil("served", spoiled)
    registry.point("served", spoiled)
    eventually(lambda: "NewVersionRefused" in prometheus.alerts("firing"), "the alert fires", SECONDS)
    assert prometheus.alerts("firing") == {"NewVersionRefused"}


def test_the_metrics_equal_mlflows_and_end_with_the_run(prometheus: Prometheus, job: Job):
    expected = {"watched": TOKENS_PER_STEP}

    def evaluated() -> bool:
        """Whether one look at the exporter has found figures of one step, after an evaluation."""
        per_step = "ray_gpt_training_tokens / ray_gpt_training_step and ray_gpt_training_validation_loss"
        return prometheus.values(f"{per_step} and ray_gpt_training_step >= 20") == expected

    eventually(evaluated, "tokens and steps agree", SECONDS)
    figures = {name: prometheus.values(f"ray_{name}").get("watched", math.nan) for name in FIGURES}
    assert figures["gpt_training_tokens_per_second"] > 0
    assert figures["gpt_training_bits_per_byte"] > 0
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 128 + signal.SIGINT

    from mlflow import MlflowClient

    client = MlflowClient(job.uri)
    run_id = json.loads((job.run_dir / "run.json").read_text())["run_id"]
    for name, logged in LOGGED.items():
        points = [point.value for point in client.get_metric_history(run_id, logged)]
        assert any(math.isclose(figures[name], value, rel_tol=1e-6) for value in points), (name, figures[name])
    eventually(lambda: not prometheus.values("ray_gpt_training_step"), "no series outlives its worker", SECONDS)
