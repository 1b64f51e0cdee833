"""What is used of Ray beyond its public API still does what it did; each failure names the function to change."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from train_job.cluster import internals
from train_job.config import build_config
from train_job.sweeps.trials import Ending, Trial


@contextlib.contextmanager
def blamed(function: str) -> Iterator[None]:
    """Says which function to change if the block raises anything."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"Ray {ray.__version__} has changed: {function} must change too ({error!r})")


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> object:
    from ray._private import services

    monkeypatch.setattr(services, "ConsolePopen", services.ConsolePopen)
    return services


def test_rays_servers_start_in_process_groups_of_their_own(services: object) -> None:
    with blamed("use_own_process_groups"):
        internals.use_own_process_groups()
        code = "import os; print(os.getpgrp() == os.getpid())"
        started = services.start_ray_process(  # type: ignore[attr-defined]
            [sys.executable, "-c", code], "test", fate_share=False, stdout_file=subprocess.PIPE
        )
        assert started.process.communicate()[0].strip() == b"True"


def test_what_raylets_report_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    over = threading.Event()

    def poll() -> tuple[None, dict[str, object]]:
        over.set()
        return None, {"job_id": None, "error_message": "a raylet says this"}

    job = SimpleNamespace(binary=lambda: b"")
    subscriber = SimpleNamespace(subscribe=lambda: None, poll=poll)
    monkeypatch.setattr(worker, "_internal_kv_initialized", lambda: False)
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    with blamed("drop_raylet_reports"):
        for drop, shown in ((lambda: None, True), (internals.drop_raylet_reports, False)):
            drop()
            over.clear()
            worker.listen_error_messages(SimpleNamespace(gcs_error_subscriber=subscriber, current_job_id=job), over)
            assert ("a raylet says this" in capsys.readouterr().out) == shown


def test_a_cluster_of_another_version_is_told_from_one_of_ours() -> None:
    from ray._private.utils import compute_version_info

    with blamed("versions_match"):
        ours, python, *_ = compute_version_info()
        assert internals.versions_match({"ray_version": ours, "python_version": python})
        assert not internals.versions_match({"ray_version": "1.0", "python_version": python})


def test_a_cluster_tells_its_versions(tmp_path: Path) -> None:
    code = """
import ray
from train_job.cluster.internals import cluster_versions
context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
found = cluster_versions(ray.get_runtime_context().gcs_address, 30)
print(found["ray_version"] == ray.__version__, "python_version" in found)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    with blamed("cluster_versions"):
        assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


def test_a_ray_of_the_jobs_own_has_a_worker_ready_and_no_helpers(tmp_path: Path) -> None:
    code = f"""
import os
import sys
import psutil
from ray.train import RunConfig, ScalingConfig
from train_job.cluster.connect import ray_cluster
from train_job.cluster.own import OwnTrainer

def loop():
    ready = "train_job.cluster.worker" in sys.modules
    ours = {{process.pid for process in psutil.Process().parent().parent().children(recursive=True)}}
    said = [process.info for process in psutil.process_iter(["pid", "cmdline"])]  # None once it has ended
    processes = [" ".join(one["cmdline"] or ()) for one in said if one["pid"] in ours]
    helpers = [p for p in processes if "Cleaner" in p or "Dataset" in p or "Coordinator" in p or "dashboard.py" in p]
    controller = any("TrainController" in p for p in processes)
    return {{"ready": ready, "threads": os.environ["OMP_NUM_THREADS"], "helpers": helpers, "controller": controller}}

with ray_cluster(1) as (ray, own):
    run = RunConfig(name="own", storage_path={str(tmp_path)!r})
    scaling = ScalingConfig(num_workers=1, resources_per_worker={{"CPU": 1}})
    print(own, OwnTrainer(loop, scaling_config=scaling, run_config=run).fit().return_value)
"""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    with blamed("bare_ray or train_job.cluster.own"):
        last = done.stdout.strip().splitlines()[-1:]
        assert last == ["True {'ready': True, 'threads': '1', 'helpers': [], 'controller': True}"], (
            done.stdout + done.stderr[-2000:]
        )


@pytest.mark.parametrize(("bits", "decision"), [(1.5, "CONTINUE"), (9.0, "STOP")])
def test_asha_judges_a_trial_by_those_that_ended_before_the_sweep_went_on(
    tmp_path: Path, bits: float, decision: str
) -> None:
    from train_job.sweeps.tune import scheduler

    trials = []
    for number in range(1, 5):
        name = f"s-{number:02}"
        trial = Trial(number, {}, build_config({"name": name}), tmp_path / name)
        trial.folder.mkdir()
        (trial.folder / "history.jsonl").write_text(f'{{"step": 10, "val_loss": 3.0, "bits_per_byte": {number + 1}}}\n')
        trial.end(Ending("FINISHED", "max_steps", 10, 1.0))
        trials.append(trial)
    with blamed("train_job.sweeps.tune.scheduler"):
        asha = scheduler(trials, 10, 2)
        stand_in = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, stand_in)
        assert asha.on_trial_result(None, stand_in, {"step": 10, "bits_per_byte": bits}) == decision
