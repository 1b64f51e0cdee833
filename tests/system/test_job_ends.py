"""Jobs that end early and are resumed: stopped, submitted and stopped, out of disk, diverged."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.refusals import one_error
from tests.system.conftest import BIN, ROOT, SMALL, Cluster, Job, Launch, environment, launching
from tests.system.runs import mlflow_client, points, run_id, status, versions
from tests.system.serving import await_figures
from train_job.cluster.exporter import FIGURES


@pytest.fixture(scope="module")
def under_way(cluster: Cluster, text_file: Path) -> Iterator[Job]:
    """A run that would take hours."""
    with launching(cluster, text_file) as start:
        job = start("under-way", "--max-steps=100000", "--schedule=wsd")
        job.await_line(r"step +20 \| validation")
        yield job


def test_a_run_can_be_watched_through_rays_exporter(under_way: Job, cluster: Cluster) -> None:
    known = set(FIGURES) - {"gpt_training_mfu_ratio"}  # a CPU's peak is unknown
    await_figures(cluster, [f"{name}{{" for name in known])


@pytest.mark.parametrize("flag", ["--name", "--resume"])
def test_a_run_has_one_owner(under_way: Job, cluster: Cluster, flag: str) -> None:
    command = [sys.executable, "train_job/run.py", f"{flag}=under-way"]
    second = subprocess.run(command, cwd=ROOT, env=environment(cluster.home), capture_output=True, text=True)
    assert second.returncode == 2
    owner = f"error: 'under-way' is being run by process {under_way.process.pid} on "
    assert one_error(second.stderr).startswith(owner)


def test_closing_the_terminal_stops_a_run_in_the_usual_way(under_way: Job) -> None:
    stopped_without_a_reader(under_way, signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.release
def test_a_run_whose_output_is_closed_can_still_be_stopped(launch: Launch) -> None:
    """As `... | tee log` at Ctrl-C, which ends tee too."""
    job = launch("unread", "--max-steps=100000")
    job.await_line(r"step +20 \| validation")
    stopped_without_a_reader(job, signal.SIGINT)


def stopped_without_a_reader(job: Job, number: signal.Signals) -> None:
    """Closes the run's output, sends the signal, and looks at how it ended."""
    assert job.process.stdout
    job.process.stdout.close()
    job.process.send_signal(number)
    assert job.process.wait(120) == 128 + number
    assert status(job) == "KILLED"
    [log] = job.run_dir.glob("training_*.log")
    assert "stopping: saving a checkpoint" in log.read_text()
    closing = rf"  stopped; go on with: .*train_job/run\.py --resume {job.run_dir.name}$"
    assert re.search(closing, log.read_text(), re.MULTILINE), log.read_text()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.release)])
def test_a_stopped_run_is_marked_killed_and_resumes_with_more_workers(launch: Launch, number: signal.Signals) -> None:
    name = f"stopped-{number.name.lower()}"
    job = launch(name, "--max-steps=2000", "--schedule=wsd", "--cooldown-fraction=0.01")
    job.await_line(r"step +20 \| validation")
    job.process.send_signal(number)
    code, output = job.finish()
    assert code == 128 + number, output
    assert f"--resume {name}" in output
    assert mlflow_client(job).get_run(run_id(job)).info.status == "KILLED"
    states = [json.loads(path.read_text())["state"] for path in job.run_dir.glob("checkpoint_*/state.json")]
    stopped_at = max(state["step"] for state in states)  # the best is kept, too
    assert stopped_at >= 20

    again = launch(name, f"--resume={name}", "--num-workers=2", f"--max-steps={stopped_at + 40}")
    code, output = again.finish()
    assert code == 0, output
    assert mlflow_client(job).get_run(run_id(job)).info.status == "FINISHED"
    steps = [step for step, _ in points(job, "train/loss")]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    assert max(steps) == stopped_at + 40


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_of_the_whole_process_group_leaves_a_checkpoint(text_file: Path, tmp_path: Path, number: signal.Signals):
    """As `timeout` does it, or a terminal that is closed, to a job with a Ray of its own."""
    command = [
        sys.executable,
        "train_job/run.py",
        *SMALL,
        f"--data={text_file}",
        "--name=grouped",
        "--max-steps=100000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(tmp_path, RAY_ADDRESS="local"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    job = Job(process, tmp_path / "runs" / "grouped", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    job.await_line(r"step +20 \| validation")
    os.killpg(process.pid, number)
    code, output = job.finish()
    assert code == 128 + number, output
    assert "stopping: saving a checkpoint" in output
    assert "--resume grouped" in output
    assert status(job) == "KILLED"


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_while_it_registers_is_finished_by_a_resume_with_one_version(
    launch: Launch, number: signal.Signals
) -> None:
    name = f"late-stop-{number.name.lower()}"
    job = launch(name)
    job.await_line("egistered model 'gpt'")
    job.process.send_signal(number)
    code, output = job.finish()
    assert code == 128 + number, output
    assert "Traceback" not in output
    assert status(job) == "KILLED"
    code, output = launch(name, f"--resume={name}").finish()
    assert code == 0, output
    assert status(job) == "FINISHED"
    [version] = versions(job)
    assert version.tags["promotion_reason"]


@pytest.mark.parametrize("working_dir", [True, pytest.param(False, marks=[pytest.mark.slow, pytest.mark.release])])
def test_the_job_runs_through_ray_job_submit(cluster: Cluster, text_file: Path, working_dir: bool) -> None:
    name = f"submitted-{working_dir}"
    command = [BIN / "ray", "job", "submit", f"--address={cluster.dashboard}"]
    command += ["--working-dir=."] if working_dir else []
    command += ["--", "python", "train_job/run.py", *SMALL, f"--data={text_file}", f"--name={name}", "--promote=always"]
    done = subprocess.run(command, cwd=ROOT, env=environment(cluster.home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "now @champion" in done.stdout
    assert (cluster.home / "runs" / name / "outcome.json").exists()


@pytest.mark.slow
def test_ray_job_stop_leaves_a_checkpoint_and_a_killed_run(cluster: Cluster, text_file: Path) -> None:
    from mlflow import MlflowClient

    ray = [BIN / "ray", "job"]
    where = f"--address={cluster.dashboard}"
    command = [*ray, "submit", where, "--submission-id=to-stop", "--", "python", "train_job/run.py", *SMALL]
    submitted = subprocess.Popen(
        [*command, f"--data={text_file}", "--name=job-stopped", "--max-steps=100000"],
        cwd=ROOT,
        env=environment(cluster.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run_dir = cluster.home / "runs" / "job-stopped"
    Job(submitted, run_dir, "").await_line(r"step +20 \| validation")
    subprocess.run([*ray, "stop", where, "to-stop"], check=True, capture_output=True, env=environment(cluster.home))
    submitted.communicate(timeout=60)
    record = json.loads((run_dir / "run.json").read_text())
    assert MlflowClient(record["tracking_uri"]).get_run(record["run_id"]).info.status == "KILLED"
    states = [json.loads(path.read_text())["state"] for path in run_dir.glob("checkpoint_*/state.json")]
    last = max(states, key=lambda state: state["step"])
    assert last["step"] > max(20, last["last_evaluated"]), "the last checkpoint is the stop's own, not a periodic one"


@pytest.mark.slow
@pytest.mark.release
def test_a_nan_loss_fails_the_run_without_a_restart(launch: Launch) -> None:
    job = launch("diverging", "--learning-rate=1e38", "--matrix-learning-rate=1e38", "--precision=fp32")
    code, output = job.finish()
    assert code == 1, output
    assert "at step" in output
    assert "last good checkpoint is kept" in output
    assert mlflow_client(job).get_run(run_id(job)).info.status == "FAILED"


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoint_steps(job: Job) -> dict[int, Path]:
    """The run's checkpoints by their step."""
    folders = job.run_dir.glob("checkpoint_*/")
    return {json.loads((folder / "state.json").read_text())["state"]["step"]: folder for folder in folders}


@pytest.mark.slow
@pytest.mark.release
def test_a_run_survives_a_full_disk_and_damaged_files(launch: Launch) -> None:
    job = launch("damaged", "--max-steps=100000", "--schedule=wsd")
    job.await_line(r"step +60 \| validation")
    history = job.run_dir / "history.jsonl"
    history.rename(job.run_dir / "aside")
    history.symlink_to("/dev/full")
    code, output = job.finish()
    assert code == 1, output
    assert f"error: the disk that holds {job.run_dir} is full" in output
    assert "--resume damaged" in output
    assert status(job) == "FAILED"
    (job.run_dir / "aside").rename(history)

    kept = checkpoint_steps(job)
    before, newest = sorted(kept)[-2:]
    flip_a_byte(kept[newest] / SHARD)
    orphan = job.run_dir / "checkpoint_of_a_killed_worker"
    orphan.mkdir()
    (job.run_dir / "samples.json").write_bytes(b"{")
    with history.open("a") as file:
        file.write('{"step": 6')
    code, output = launch("damaged", "--resume=damaged", f"--max-steps={newest + 40}").finish()
    assert code == 0, output
    assert f"skipped a checkpoint: {kept[newest] / SHARD} is truncated or changed" in output
    assert f"{orphan / 'state.json'} is missing" in output
    assert f"resumed   from step {before}" in output
    assert "samples.json was damaged" in output
    assert status(job) == "FINISHED"
    left = list(job.run_dir.glob("checkpoint_*/"))
    assert len(left) <= 3, "what nothing lists was removed"
    assert not {orphan, kept[newest]} & set(left), output
    assert len(checkpoint_steps(job)) == len(left)

    for folder in left:
        (folder / SHARD).unlink()
    code, output = launch("damaged", "--resume=damaged", f"--max-steps={newest + 60}").finish()
    assert code == 2, output
    assert "error: all checkpoints of this run are damaged: " in output
    assert f"{SHARD} is missing" in output
    assert status(job) == "FAILED"
