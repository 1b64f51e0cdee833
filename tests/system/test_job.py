"""The job as a user runs it: a real cluster, real processes, a real registry."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.hugging_face import publish_gpt2, put_into_cache
from tests.system.conftest import BIN, ROOT, SMALL, Cluster, Job, environment, what_now
from tests.system.serving import await_figures
from tests.system.tracking import TrackingServer
from train_job.exporter import FIGURES
from train_job.worker import UNJUDGED

Launch = Callable[..., Job]


def mlflow_client(job: Job) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(job.uri)


def run_id(job: Job) -> str:
    return str(json.loads((job.run_dir / "run.json").read_text())["run_id"])


def points(job: Job, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow_client(job).get_metric_history(run_id(job), key)]


def artifacts(job: Job, folder: str = "") -> list[str]:
    return [a.path for a in mlflow_client(job).list_artifacts(run_id(job), folder)]


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.run_dir / "package" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, text_file: Path) -> Job:
    """A run that nothing happens to; the others are compared with it."""
    command = [sys.executable, "train_job/run.py", *SMALL, f"--data={text_file}", "--name=undisturbed"]
    command += ["--target-loss=0.5"]  # which it does not reach
    env = environment(cluster.home, RAY_ADDRESS=cluster.address)
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job = Job(process, cluster.home / "runs" / "undisturbed", f"sqlite:///{cluster.home}/mlflow/mlflow.db")
    code, output = job.finish()
    assert code == 0, output
    return job


def test_a_finished_run_has_its_curves_artifacts_and_a_registered_version(undisturbed: Job) -> None:
    client, run = mlflow_client(undisturbed), mlflow_client(undisturbed).get_run(run_id(undisturbed))
    assert run.info.status == "FINISHED"
    assert [step for step, _ in points(undisturbed, "train/loss")] == list(range(5, 61, 5))
    assert [step for step, _ in points(undisturbed, "val/bits_per_byte")] == [0, 20, 40, 60]
    expected = "train/bits_per_byte learning_rate grad_norm tokens_per_second tokens_seen epoch val/loss"
    assert set(expected.split()) <= set(run.data.metrics)
    memory = {name for name in run.data.metrics if "peak_mb" in name}
    assert memory == {f"system/peak_mb {whose} memory" for whose in ("driver", "worker 0")}, (
        "shown last, as the system's"
    )
    assert run.data.tags["mlflow.note.content"].startswith("quick: ")
    assert run.data.params["hidden_size"] == "64"
    assert "hardware.cpu" in run.data.tags
    assert {i.dataset.name for i in run.inputs.dataset_inputs}
    names = artifacts(undisturbed) + artifacts(undisturbed, "figures")
    pictures = {f"figures/{name}.png" for name in ("loss_curve", "temperature_effect", "decoding_strategies")}
    assert pictures | {"samples.json", "config.yaml"} <= set(names)
    assert any(name.startswith("training_") and name.endswith(".log") for name in names)
    [version] = [v for v in client.search_model_versions("name='gpt'") if v.run_id == run.info.run_id]
    assert float(version.tags["bits_per_byte"]) == pytest.approx(points(undisturbed, "val/bits_per_byte")[-1][1])
    assert version.tags["promotion_reason"]


def test_a_target_that_was_not_reached_is_told_with_how_far_it_was_and_how_to_go_on(undisturbed: Job) -> None:
    best = min(value for _, value in points(undisturbed, "val/loss"))
    [target] = json.loads((undisturbed.run_dir / "outcome.json").read_text())["targets"]
    assert (target["target"], target["wanted"], "reached_step" in target) == ("target_loss", 0.5, False)
    assert target["best"] == pytest.approx(best)
    assert points(undisturbed, "target_loss_missed_by") == [(60, pytest.approx(best - 0.5))]
    said = next(undisturbed.run_dir.glob("training_*.log")).read_text()
    assert f"target    validation loss 0.5 not reached: the lowest was {best:.4f}, {best - 0.5:.4f} above" in said
    assert "--resume undisturbed --max-steps N" in said


def test_the_registered_version_speaks_through_mlflow_and_through_generate(undisturbed: Job) -> None:
    code = (
        "import mlflow, pandas\n"
        f"mlflow.set_tracking_uri({undisturbed.uri!r})\n"
        "model = mlflow.pyfunc.load_model('models:/gpt@champion')\n"
        "print(len(model.predict(pandas.DataFrame({'prompt': ['1 green', 'x']}), params={'max_new_tokens': 4})))"
    )
    spoken = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert spoken.stdout.strip() == "2", spoken.stderr
    command = [sys.executable, "-m", "gptcore.generate", "models:/gpt@champion", "--prompt", "10 green", "--greedy"]
    env = environment(undisturbed.run_dir.parents[1])
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_a_run_ends_with_what_now_whose_commands_work_as_they_stand(undisturbed: Job) -> None:
    block = what_now(next(undisturbed.run_dir.glob("training_*.log")).read_text())
    assert f"/runs/{run_id(undisturbed)}?" in block["its page"]
    env = environment(undisturbed.run_dir.parents[1])
    said = subprocess.run(block["ask it"], shell=True, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("The")


def test_a_run_whose_worker_is_killed_ends_with_identical_weights(launch: Launch, undisturbed: Job) -> None:
    job = launch("killed-worker")
    job.await_line(r"step +20 \| validation")
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or ())]
    ours = [p for p in workers if p.environ().get("GPT_FOUNDRY_HOME") == str(job.run_dir.parents[1])]
    assert ours, "no training worker was found to kill"
    for worker in ours:
        worker.send_signal(signal.SIGKILL)
    code, output = job.finish()
    assert code == 0, output
    assert re.search(r"^restarted from step \d+ with 1 worker: worker 0 lost its process", output, re.MULTILINE), output
    assert "(raylet)" not in output, "Ray's own words"
    mine, theirs = weights(job), weights(undisturbed)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [step for step, _ in points(job, "train/loss")] == list(range(5, 61, 5)), "a step was lost or logged twice"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_whose_output_has_lost_its_reader_is_stopped_as_any_other(launch: Launch, number: signal.Signals) -> None:
    """As `... | tee log` at Ctrl-C, which ends tee too, and as a terminal that is closed."""
    name = f"unread-{number.name.lower()}"
    job = launch(name, "--max-steps=100000")
    job.await_line(r"step +20 \| validation")
    assert job.process.stdout
    job.process.stdout.close()
    job.process.send_signal(number)
    assert job.process.wait(120) == 128 + number
    assert status(job) == "KILLED"
    [log] = job.run_dir.glob("training_*.log")
    assert "stopping: saving a checkpoint" in log.read_text()
    closing = rf"  stopped; go on with: .*train_job/run\.py --resume {name}$"
    assert re.search(closing, log.read_text(), re.MULTILINE), log.read_text()[-2000:]


def test_two_workers_see_the_same_batches_and_agree_on_the_loss(launch: Launch, undisturbed: Job) -> None:
    job = launch("two-workers", "--num-workers=2")
    code, output = job.finish()
    assert code == 0, output
    for (step, one), (_, two) in zip(points(undisturbed, "train/loss"), points(job, "train/loss"), strict=True):
        assert one == pytest.approx(two, rel=1e-3), f"step {step}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_marked_killed_and_goes_on_with_more_workers(
    launch: Launch, undisturbed: Job, number: signal.Signals
) -> None:
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


def test_a_run_can_be_watched_through_rays_exporter(launch: Launch, cluster: Cluster) -> None:
    job = launch("watched", "--max-steps=100000", "--schedule=wsd")
    job.await_line(r"step +20 \| validation")
    known = set(FIGURES) - {"gpt_training_mfu_ratio"}  # nobody knows a CPU's peak
    await_figures(cluster, [f"{name}{{" for name in known])
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 128 + signal.SIGINT


def status(job: Job) -> str:
    return str(mlflow_client(job).get_run(run_id(job)).info.status)


def versions(job: Job) -> list[Any]:
    return [v for v in mlflow_client(job).search_model_versions("name='gpt'") if v.run_id == run_id(job)]


def test_a_run_stopped_before_its_first_step_is_marked_killed_and_can_begin_again(
    launch: Launch, undisturbed: Job
) -> None:
    job = launch("early-stop")
    job.await_line(r"^tracking")
    job.process.send_signal(signal.SIGTERM)
    code, output = job.finish()
    assert code == 143, output
    assert "--resume early-stop" in output
    assert status(job) == "KILLED"
    code, output = launch("early-stop", "--resume=early-stop").finish()
    assert code == 0, output
    assert status(job) == "FINISHED"
    mine, theirs = weights(job), weights(undisturbed)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_while_it_registers_is_finished_by_a_resume_with_one_version(
    launch: Launch, undisturbed: Job, number: signal.Signals
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


def test_a_resume_that_adds_no_step_adds_no_version(launch: Launch, undisturbed: Job) -> None:
    assert len(versions(undisturbed)) == 1
    code, output = launch("undisturbed", "--resume=undisturbed", "--max-steps=40").finish()
    assert code == 0, output
    assert "nothing new to register: max_steps is met at step 60 already" in output
    assert f"gpt version {versions(undisturbed)[0].version}" in output
    assert len(versions(undisturbed)) == 1
    assert status(undisturbed) == "FINISHED"
    code, output = launch("undisturbed", "--resume=undisturbed").finish()
    assert "is finished" in output, output


@pytest.mark.slow
def test_a_run_can_keep_its_checkpoints_behind_a_url(launch: Launch, undisturbed: Job, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = launch("behind-a-url", "--max-steps=20", "--schedule=linear", f"--storage-path={store.as_uri()}")
    code, output = job.finish()
    assert code == 0, output
    assert list((store / "behind-a-url").glob("checkpoint_*/model.safetensors"))
    assert not list(job.run_dir.glob("checkpoint_*"))
    assert (job.run_dir / "package" / "model.safetensors").exists()
    code, output = launch("behind-a-url", "--resume=behind-a-url", "--max-steps=40").finish()
    assert code == 0, output
    assert "from step 20" in output
    assert [step for step, _ in points(job, "val/loss")] == [0, 20, 40]


def test_a_finished_run_resumed_without_news_is_shown_again(launch: Launch, undisturbed: Job) -> None:
    job = launch("undisturbed", "--resume=undisturbed")
    code, output = job.finish()
    assert code == 0
    assert "is finished" in output
    assert "registry" in output


@pytest.mark.parametrize("working_dir", [False, True])
def test_the_job_runs_through_ray_job_submit(cluster: Cluster, text_file: Path, working_dir: bool) -> None:
    name = f"submitted-{working_dir}"
    command = [BIN / "ray", "job", "submit", f"--address={cluster.dashboard}"]
    command += ["--working-dir=."] if working_dir else []
    command += ["--", "python", "train_job/run.py", *SMALL, f"--data={text_file}", f"--name={name}", "--promote=always"]
    done = subprocess.run(command, cwd=ROOT, env=environment(cluster.home), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "now @champion" in done.stdout
    assert (cluster.home / "runs" / name / "outcome.json").exists()


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
    last = json.loads((run_dir / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
    assert last["metrics"]["val_loss"] == UNJUDGED, "the last checkpoint is the stop's own, not a periodic one"
    state = json.loads((run_dir / last["checkpoint_dir_name"] / "state.json").read_text())["state"]
    assert state["step"] == last["metrics"]["step"] > 20


@pytest.mark.slow
def test_an_elastic_run_uses_what_there_is_and_takes_the_same_steps(launch: Launch, undisturbed: Job) -> None:
    job = launch("elastic", "--num-workers=1:2")
    code, output = job.finish()
    assert code == 0, output
    assert points(job, "val/loss")[-1][1] == pytest.approx(points(undisturbed, "val/loss")[-1][1], rel=1e-3)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_champion_and_records_its_parent(
    launch: Launch, undisturbed: Job, text_file: Path
) -> None:
    job = launch(
        "child", f"--data={text_file}", "--init-from=models:/gpt@champion", "--max-steps=10", "--eval-interval=5",
        "--learning-rate=1e-4", "--matrix-learning-rate=1e-4", "--sample-tokens=0", small=False,
    )  # fmt: skip
    code, output = job.finish()
    assert code == 0, output
    [version] = [v for v in mlflow_client(job).search_model_versions("name='gpt'") if v.run_id == run_id(job)]
    assert version.tags["parent"].startswith("models:/gpt/")
    step, bits = points(job, "val/bits_per_byte")[0]
    assert (step, float(version.tags["parent_bits_per_byte"])) == (0, pytest.approx(bits))
    assert f"its parent {version.tags['parent']} needs {bits:.4f} on it" in output
    assert points(job, "val/loss")[0][1] < points(undisturbed, "val/loss")[1][1], "it did not start from scratch"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a package's folder", "GPT-2 in the hub's cache"])
def test_fine_tuning_names_its_parent_and_stops_at_the_training_loss_that_was_asked_for(
    launch: Launch, undisturbed: Job, tmp_path: Path, kind: str
) -> None:
    put_into_cache(tmp_path / "hub", "openai-community/gpt2", publish_gpt2(tmp_path / "gpt2"))
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    parent, name = (str(undisturbed.run_dir / "package"), "of-folder") if "folder" in kind else ("hf:gpt2", "of-gpt2")
    job = launch(
        name, f"--init-from={parent}", "--max-steps=400", "--log-interval=5", "--eval-interval=100",
        "--target-train-loss=3", "--learning-rate=1e-3", "--matrix-learning-rate=1e-3", "--sample-tokens=0",
        small=False, **hub,
    )  # fmt: skip
    code, output = job.finish()
    assert code == 0, output
    [version] = [v for v in mlflow_client(job).search_model_versions("name='gpt'") if v.run_id == run_id(job)]
    assert version.tags["parent"] == parent
    last, loss = points(job, "train/loss")[-1]
    assert loss <= 3
    assert f"target    training loss 3 reached at step {last} after" in output
    [target] = json.loads((job.run_dir / "outcome.json").read_text())["targets"]
    assert (target["reached_step"], target["best"]) == (last, pytest.approx(loss))
    assert points(job, "target_reached_step") == [(last, last)]
    assert points(job, "target_reached_seconds")[0][1] == pytest.approx(target["reached_seconds"])
    assert json.loads((job.run_dir / "package" / "foundry.json").read_text())["training"]["step"] == last
    assert "target    training loss 3 reached" in launch(name, f"--resume={name}").finish()[1], "told again"


def test_a_loss_that_is_no_number_fails_the_run_without_a_restart(launch: Launch) -> None:
    job = launch("diverging", "--learning-rate=1e38", "--matrix-learning-rate=1e38", "--precision=fp32")
    code, output = job.finish()
    assert code == 1, output
    assert "at step" in output
    assert "last good checkpoint is kept" in output
    assert mlflow_client(job).get_run(run_id(job)).info.status == "FAILED"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoint_steps(job: Job) -> dict[int, Path]:
    """The run's checkpoints by their step."""
    folders = job.run_dir.glob("checkpoint_*/")
    return {json.loads((folder / "state.json").read_text())["state"]["step"]: folder for folder in folders}


def test_a_full_disk_and_damage_are_outlived_and_the_run_has_one_owner(launch: Launch, cluster: Cluster) -> None:
    job = launch("damaged", "--max-steps=100000", "--schedule=wsd")
    job.await_line(r"step +60 \| validation")
    for flags in (["--name=damaged"], ["--resume=damaged"]):
        command = [sys.executable, "train_job/run.py", *flags]
        second = subprocess.run(command, cwd=ROOT, env=environment(cluster.home), capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: 'damaged' is being run by process {job.process.pid} on ")
        assert second.stderr.count("\n") == 1

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
    flip_a_byte(kept[newest] / "model.safetensors")
    orphan = job.run_dir / "checkpoint_of_a_killed_worker"
    orphan.mkdir()
    (job.run_dir / "checkpoint_manager_snapshot.json").write_bytes(b"")  # Ray writes it in place
    (job.run_dir / "samples.json").write_bytes(b"{")
    with history.open("a") as file:
        file.write('{"step": 6')
    code, output = launch("damaged", "--resume=damaged", f"--max-steps={newest + 40}").finish()
    assert code == 0, output
    assert f"stepped over a checkpoint: {kept[newest] / 'model.safetensors'} is cut short or altered" in output
    assert f"{orphan / 'state.json'} is missing" in output
    assert f"resumed   from step {before}" in output
    assert "samples.json was damaged" in output
    assert status(job) == "FINISHED"
    left = list(job.run_dir.glob("checkpoint_*/"))
    assert len(left) <= 3, "what nothing lists was removed"
    assert not {orphan, kept[newest]} & set(left), output
    assert len(checkpoint_steps(job)) == len(left)

    for folder in left:
        (folder / "optimizer.safetensors").unlink()
    code, output = launch("damaged", "--resume=damaged", f"--max-steps={newest + 60}").finish()
    assert code == 2, output
    assert "error: no checkpoint of this run is whole: " in output
    assert "optimizer.safetensors is missing" in output
    assert status(job) == "FAILED"


@pytest.mark.slow
def test_a_tracking_server_that_is_away_for_a_while_costs_no_step_and_no_point(launch: Launch, tmp_path: Path) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    try:
        server.await_answer()
        job = launch("outage", "--max-steps=200", MLFLOW_TRACKING_URI=server.uri)
        job.await_line(r"step +20 \| validation")
        server.kill()
        job.await_line(r"step +120 \| validation")
        server.start()
        code, output = job.finish()
        assert code == 0, output
        assert [step for step, _ in points(job, "train/loss")] == list(range(5, 201, 5))
        assert [step for step, _ in points(job, "val/loss")] == list(range(0, 201, 20))
        assert mlflow_client(job).get_run(run_id(job)).info.status == "FINISHED"
    finally:
        server.kill()


def test_a_password_in_the_tracking_uri_is_neither_printed_nor_written(launch: Launch, tmp_path: Path) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    try:
        server.await_answer()
        uri = server.uri.replace("://", "://me:secret@")
        job = launch("password", "--max-steps=20", MLFLOW_TRACKING_URI=uri)
        code, output = job.finish()
        assert code == 0, output
        assert json.loads((job.run_dir / "run.json").read_text())["tracking_uri"] == server.uri
        told = [output, *(path.read_text(errors="replace") for path in job.run_dir.rglob("*") if path.is_file())]
        assert not [text for text in told if "secret" in text]
    finally:
        server.kill()
