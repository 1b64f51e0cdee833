"""Many machines: three hosts, the same two commands, and one host that dies.

Training goes on with the other hosts. Serving only loses the requests that the dead host was answering.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, make_package, registry_in
from tests.system.conftest import BIN, SMALL, Job
from tests.system.hosts import Host, Machines, machines
from tests.system.serving import BODY, QUICK, START_SECONDS, Load, Service, name_of, said
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too

pytestmark = pytest.mark.slow


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Machines]:
    """Ray on three hosts of two CPUs."""
    with machines(3, tmp_path) as found:
        yield found


def test_training_survives_the_loss_of_a_host_and_ends_as_one_run_with_a_version(three: Machines, text_file: Path):
    head = three.hosts[0]
    flags = ["--name=three-hosts", "--parallel=fsdp", "--num-workers=2:3", "--cpus-per-worker=2", "--max-steps=200"]
    flags.append(f"--data={text_file}")
    command = [BIN / "ray", "job", "submit", f"--address={three.cluster.dashboard}", "--"]
    process = head.popen(*command, "python", "train_job/run.py", *SMALL, *flags)
    job = Job(process, head.home / "runs" / "three-hosts", three.tracking.uri)
    job.await_line(r"step +20 \| validation")
    three.hosts[2].die()
    code, output = job.finish()
    assert code == 0, output
    assert re.search(r"restarted from step \d+ with 2 workers: ", output), output
    assert "worker 1 memory" in output
    assert "worker 2 memory" not in output

    with registry_in(head.home, lambda *_: pytest.fail("nothing is to be made"), three.tracking.uri) as registry:
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
    three: Machines, make_package: MakePackage, tmp_path: Path
):
    head, _, lost = three.hosts
    port = free_port()
    settings = QUICK | {"model": "models:/spread@champion", "host": "0.0.0.0", "port": port}
    settings |= {"min_replicas": 3, "max_replicas": 3, "num_cpus": 2}
    with registry_in(head.home, make_package, three.tracking.uri) as registry:
        registry.publish("spread", hidden_size=128, num_layers=4)
    command = [BIN / "serve", "run", "serve_app:build_app", *said(**settings)]
    with (tmp_path / "serve.log").open("w") as log:
        env = {"RAY_ADDRESS": three.cluster.address, "MLFLOW_TRACKING_URI": three.tracking.uri}
        head.popen(*command, stdout=log, **env)
    fronts = [Service(f"http://{host.address}:{port}", three.cluster) for host in three.hosts]
    try:
        eventually(lambda: all(front.is_ready() for front in fronts), "every host answers", START_SECONDS)
    except AssertionError as error:
        log_text = (tmp_path / "serve.log").read_text()
        raise AssertionError(f"{error}\n{fronts[0].ask('/models', None)}\n{log_text[-4000:]}") from error
    eventually(lambda: all(replicas_of(host) == 1 for host in three.hosts), "each host has a replica", 60)
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
