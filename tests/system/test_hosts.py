"""Many machines: three hosts, the same two commands, and one host that dies.

Training goes on with the other hosts. Serving only loses the requests that the dead host was answering.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.front import haproxy
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, make_package, registry_in
from tests.system.conftest import BIN, SMALL, Cluster, Job
from tests.system.hosts import Host, hosts, start_ray
from tests.system.serving import BODY, QUICK, START_SECONDS, Load, Service, name_of, said
from tests.system.tracking import TrackingServer
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too

pytestmark = pytest.mark.slow

NOTICED = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}
"""A silent host is given up after five seconds and not a minute."""
SILENCE_S = "20"
"""HAProxy waits no longer for a host that has stopped in the middle of an answer."""


@dataclass
class Machines:
    """Three hosts with a Ray over all of them, and a tracking server that each of them reaches."""

    hosts: list[Host]
    tracking: TrackingServer
    cluster: Cluster


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Ray on three hosts of two CPUs, started as docs/cluster.md says."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp,
        hosts(3, tmp_path / "home") as three,
    ):
        head, *others = three
        tracking = TrackingServer(tmp_path, head.gateway)
        tracking.start()
        try:
            env = NOTICED | {"MLFLOW_TRACKING_URI": tracking.uri}
            haproxy.use_haproxy(env)
            env["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] = SILENCE_S
            port, dashboard = 6379, 8265
            start_ray(head, "--head", f"--port={port}", f"--dashboard-host={head.address}", temp=temp, **env)
            for host in others:
                start_ray(host, f"--address={head.address}:{port}", temp=temp, **env)
            tracking.await_answer()
            cluster = Cluster(f"{head.address}:{port}", f"http://{head.address}:{dashboard}", head.home)
            yield Machines(three, tracking, cluster)
        finally:
            tracking.kill()


def test_training_survives_the_loss_of_a_host_and_ends_as_one_run_with_a_version(machines: Machines, text_file: Path):
    head = machines.hosts[0]
    flags = ["--name=three-hosts", "--parallel=fsdp", "--num-workers=2:3", "--cpus-per-worker=2", "--max-steps=200"]
    flags.append(f"--data={text_file}")
    command = [BIN / "ray", "job", "submit", f"--address={machines.cluster.dashboard}", "--"]
    process = head.popen(*command, "python", "train_job/run.py", *SMALL, *flags)
    job = Job(process, head.home / "runs" / "three-hosts", machines.tracking.uri)
    job.await_line(r"step +20 \| validation")
    machines.hosts[2].die()
    code, output = job.finish()
    assert code == 0, output
    assert re.search(r"restarted from step \d+ with 2 workers: ", output), output
    assert "worker 1 memory" in output
    assert "worker 2 memory" not in output

    with registry_in(head.home, lambda *_: pytest.fail("nothing is to be made"), machines.tracking.uri) as registry:
        client = registry.client
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert run.info.status == "FINISHED"
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(5, 201, 5)), "a step was lost or logged twice"
        (version,) = client.search_model_versions("name='gpt'")
        assert version.run_id == run.info.run_id
        assert client.get_model_version_by_alias("gpt", "champion").version == version.version


@pytest.mark.release
def test_losing_a_host_only_fails_the_requests_that_it_was_answering(
    machines: Machines, make_package: MakePackage, tmp_path: Path
):
    head, _, lost = machines.hosts
    port = free_port()
    settings = QUICK | {"model": "models:/spread@champion", "host": "0.0.0.0", "port": port}
    settings |= {"min_replicas": 3, "max_replicas": 3, "num_cpus": 2}
    with registry_in(head.home, make_package, machines.tracking.uri) as registry:
        registry.publish("spread", hidden_size=128, num_layers=4)
    command = [BIN / "serve", "run", "serve_app:build_app", *said(**settings)]
    with (tmp_path / "serve.log").open("w") as log:
        env = {"RAY_ADDRESS": machines.cluster.address, "MLFLOW_TRACKING_URI": machines.tracking.uri}
        head.popen(*command, stdout=log, **env)
    fronts = [Service(f"http://{host.address}:{port}", machines.cluster) for host in machines.hosts]
    try:
        eventually(lambda: all(front.is_ready() for front in fronts), "every host answers", START_SECONDS)
    except AssertionError as error:
        log_text = (tmp_path / "serve.log").read_text()
        raise AssertionError(f"{error}\n{fronts[0].ask('/models', None)}\n{log_text[-4000:]}") from error
    eventually(lambda: all(replicas_of(host) == 1 for host in machines.hosts), "each host has a replica", 60)
    service = fronts[0]

    clients = 6
    with Load(service, clients, BODY | {"max_new_tokens": 100}) as load:
        eventually(lambda: load.answered() > 20, "requests are answered", 60)
        lost.die()
        answered = load.answered()
        eventually(lambda: load.answered() > answered + 100, "the others answer", 120)
    assert sum(load.failed.values()) <= clients, load.failed
    with Load(service, clients) as after:
        eventually(lambda: after.answered() > 50, "requests are answered", 60)
    assert after.failed == {}


def replicas_of(host: Host) -> int:
    return sum("ServeReplica" in name_of(process) for process in host.processes())
