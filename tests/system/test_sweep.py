"""Sweeps as a user runs them: a real cluster with a real Ray Tune, real trials, a real registry."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import BIN, ROOT, SMALL, Cluster, Job, environment

Sweeps = Callable[..., Job]
pytestmark = [pytest.mark.slow, pytest.mark.release]


@pytest.fixture(scope="module")
def sweeps(cluster: Cluster, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeps]:
    """Starts `python train_job/sweep.py` on the cluster with this YAML, or with `--resume` and no YAML."""
    jobs: list[Job] = []

    def start(name: str, text: str = "", *flags: str) -> Job:
        arguments = [f"--resume={name}"]
        if text:
            file = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
            file.write_text(text)
            shape = [flag for flag in SMALL if flag.split("=")[0] not in ("--learning-rate", "--max-steps")]
            arguments = [str(file), *shape, f"--data={text_file}", f"--name={name}", f"--register-as={name}"]
        process = subprocess.Popen(
            [sys.executable, "train_job/sweep.py", *arguments, *flags],
            cwd=ROOT,
            env=environment(cluster.home, RAY_ADDRESS=cluster.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        jobs.append(Job(process, cluster.home / "runs" / name, f"sqlite:///{cluster.home}/mlflow/mlflow.db"))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def parent(job: Job) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(job.uri).get_run(json.loads((job.run_dir / "run.json").read_text())["run_id"])


def children(job: Job) -> dict[str, Any]:
    """The runs of the trials, by the trial's number, "01" and so on."""
    from mlflow import MlflowClient

    above = parent(job).info
    found = MlflowClient(job.uri).search_runs([above.experiment_id], f"tags.`mlflow.parentRunId` = '{above.run_id}'")
    return {run.info.run_name.removeprefix(f"{job.run_dir.name}-")[:2]: run for run in found}


def steps(job: Job, run: Any, key: str) -> list[int]:
    from mlflow import MlflowClient

    return [m.step for m in MlflowClient(job.uri).get_metric_history(run.info.run_id, key)]


FOUR = """
search: {learning_rate: [3.0e-3, 1.0e+38, 1.0e-6, 2.0e-3]}
grid: true
base: {max_steps: 160}
concurrency: 1
reduction: 2
keep: 1
"""


@pytest.fixture(scope="module")
def swept(sweeps: Sweeps) -> tuple[Job, str]:
    """Four trials in this order: one that learns, one that diverges, one that hardly learns, one that learns.

    They are so long that a trial is still at work when its first evaluation has come to ASHA.
    """
    job = sweeps("swept", FOUR)
    code, output = job.finish()
    assert code == 0, output
    return job, output


def test_every_trial_is_a_child_run_of_the_sweep_with_its_metrics_once(swept: tuple[Job, str]) -> None:
    job, _ = swept
    runs = children(job)
    assert sorted(runs) == ["01", "02", "03", "04"]
    assert runs["03"].info.run_name == "swept-03 learning_rate=1e-06"
    assert [runs[n].data.params["learning_rate"] for n in sorted(runs)] == ["0.003", "1e+38", "1e-06", "0.002"]
    assert steps(job, runs["01"], "val/bits_per_byte") == list(range(0, 161, 20))
    assert steps(job, runs["01"], "train/loss") == list(range(5, 161, 5))
    assert runs["01"].data.tags["sweep.end"] == "max_steps at step 160"


def test_a_trial_that_falls_behind_is_stopped_early_and_says_so(swept: tuple[Job, str]) -> None:
    job, output = swept
    run = children(job)["03"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["sweep.end"] == "ASHA at step 20"
    assert max(steps(job, run, "train/loss")) < 160
    assert "ASHA at step 20" in output


def test_a_trial_that_diverges_fails_alone(swept: tuple[Job, str]) -> None:
    job, output = swept
    run = children(job)["02"]
    assert run.info.status == "FAILED"
    assert run.data.tags["sweep.end"].startswith("failed: the")
    assert "swept-02  failed: the" in output


def test_the_best_trial_is_registered_like_a_single_run(swept: tuple[Job, str]) -> None:
    from mlflow import MlflowClient

    job, output = swept
    assert parent(job).info.status == "FINISHED"
    runs, client = children(job), MlflowClient(job.uri)
    figures = {
        n: min(m.value for m in client.get_metric_history(run.info.run_id, "val/bits_per_byte"))
        for n, run in runs.items()
        if run.info.status == "FINISHED"
    }
    best = min(figures, key=figures.__getitem__)
    version = client.get_model_version_by_alias("swept", "champion")
    assert version.run_id == runs[best].info.run_id
    assert float(version.tags["bits_per_byte"]) == pytest.approx(figures[best])
    assert version.tags["sweep"] == "swept"
    assert version.tags["promotion_reason"]
    assert parent(job).data.tags["sweep.best"] == f"swept-{best}"
    assert "now @champion" in output


def test_the_sweep_leaves_a_table_figures_and_only_the_best_weights(swept: tuple[Job, str]) -> None:
    from mlflow import MlflowClient

    job, _ = swept
    client, run = MlflowClient(job.uri), parent(job)
    names = [a.path for folder in ("", "figures") for a in client.list_artifacts(run.info.run_id, folder)]
    assert {"trials.json", "trials.csv", "sweep.yaml", "figures/trials.png", "figures/best_so_far.png"} <= set(names)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "trials.json", "type": "table"}]
    rows = json.loads((job.run_dir / "trials.json").read_text())
    assert [row[0] for row in rows["data"]] == [1, 2, 3, 4]
    assert rows["data"][-1][1] == "swept-02"
    kept = {path.parts[-2] for path in job.run_dir.glob("swept-*/package")}
    assert kept == {run.data.tags["sweep.best"]}
    assert {path.parts[-3] for path in job.run_dir.glob("swept-*/checkpoint_*/*.safetensors")} == kept


SHORT_AND_LONG = "search: {max_steps: [20, 2000]}\ngrid: true\nconcurrency: 1\nasha: false\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_continues_where_it_was(sweeps: Sweeps, number: signal.Signals) -> None:
    name = f"sweep-{number.name.lower()}"
    job = sweeps(name, SHORT_AND_LONG, "--eval-interval=200", "--schedule=linear")
    job.await_line(rf"^{name}-01 .*max_steps at step 20")
    job.await_line(r"02 step \d+, ")
    job.process.send_signal(number)
    code, output = job.finish()
    if number == signal.SIGINT:
        assert code == 130, output
        assert f"python train_job/sweep.py --resume {name}" in output
        assert (parent(job).info.status, children(job)["02"].info.status) == ("KILLED", "KILLED")
    assert not (job.run_dir / f"{name}-02" / "trial.json").exists()

    code, output = sweeps(name).finish()
    assert code == 0, output
    assert "now @champion" in output
    runs = children(job)
    assert sorted(runs) == ["01", "02"]
    assert {parent(job).info.status, *(run.info.status for run in runs.values())} == {"FINISHED"}
    assert len(list((job.run_dir / f"{name}-01").glob("training_*.log"))) == 1, "a finished trial was run again"
    logs = "".join(path.read_text() for path in (job.run_dir / f"{name}-02").glob("training_*.log"))
    assert "resumed   from step" in logs
    assert steps(job, runs["02"], "val/bits_per_byte") == list(range(0, 2001, 200))


@pytest.mark.parametrize("working_dir", [False, True])
def test_a_sweep_runs_through_ray_job_submit(
    cluster: Cluster, text_file: Path, tmp_path: Path, working_dir: bool
) -> None:
    name, file = f"sweep-submitted-{working_dir}", tmp_path / "one.yaml"
    file.write_text("search: {seed: [1]}\ngrid: true\n")
    command = [BIN / "ray", "job", "submit", f"--address={cluster.dashboard}"]
    command += ["--working-dir=."] if working_dir else []
    command += ["--", "python", "train_job/sweep.py", file, *SMALL, f"--data={text_file}", f"--name={name}"]
    command += [f"--register-as={name}", "--max-steps=20"]
    done = subprocess.run(command, cwd=ROOT, env=environment(cluster.home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "now @champion" in done.stdout
