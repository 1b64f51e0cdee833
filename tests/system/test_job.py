"""The job as a user runs it: a real cluster, real processes, a real registry."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.hugging_face import publish_gpt2, put_into_cache
from tests.system.conftest import ROOT, Job, Launch, environment, what_now
from tests.system.runs import artifacts, mlflow_client, points, run_id, status, versions, weights
from tests.system.tracking import TrackingServer
from tests.waiting import eventually


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


def test_a_missed_target_is_reported_with_the_gap_and_how_to_continue(undisturbed: Job) -> None:
    best = min(value for _, value in points(undisturbed, "val/loss"))
    [target] = json.loads((undisturbed.run_dir / "outcome.json").read_text())["targets"]
    assert (target["target"], target["wanted"], "reached_step" in target) == ("target_loss", 0.5, False)
    assert target["best"] == pytest.approx(best)
    assert points(undisturbed, "target_loss_missed_by") == [(60, pytest.approx(best - 0.5))]
    said = next(undisturbed.run_dir.glob("training_*.log")).read_text()
    assert f"target    validation loss 0.5 not reached: the lowest was {best:.4f}, {best - 0.5:.4f} above" in said
    assert "--resume undisturbed --max-steps N" in said


def test_the_registered_version_generates_through_mlflow_and_through_generate(undisturbed: Job) -> None:
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


def test_a_run_ends_with_next_commands_that_work_as_printed(undisturbed: Job) -> None:
    block = what_now(next(undisturbed.run_dir.glob("training_*.log")).read_text())
    assert f"/runs/{run_id(undisturbed)}?" in block["its page"]
    env = environment(undisturbed.run_dir.parents[1])
    said = subprocess.run(block["ask it"], shell=True, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("The")


def test_a_run_whose_worker_is_killed_ends_with_identical_weights(launch: Launch, undisturbed: Job) -> None:
    job = launch("killed-worker")
    job.await_line(r"^tracking")
    eventually(lambda: [*job.run_dir.glob("checkpoint_*/state.json")], "a checkpoint is written", 120)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or ())]
    ours = []
    for worker in workers:
        with contextlib.suppress(psutil.Error):  # another test's, which has just ended
            if worker.environ().get("GPT_FOUNDRY_HOME") == str(job.run_dir.parents[1]):
                ours.append(worker)
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


@pytest.mark.slow
def test_two_workers_see_the_same_batches_and_agree_on_the_loss(launch: Launch, undisturbed: Job) -> None:
    job = launch("two-workers", "--num-workers=2")
    code, output = job.finish()
    assert code == 0, output
    for (step, one), (_, two) in zip(points(undisturbed, "train/loss"), points(job, "train/loss"), strict=True):
        assert one == pytest.approx(two, rel=1e-3), f"step {step}"


@pytest.mark.slow
@pytest.mark.release
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
@pytest.mark.release
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
@pytest.mark.release
def test_a_run_can_keep_its_checkpoints_at_a_url(launch: Launch, undisturbed: Job, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = launch("behind-a-url", "--max-steps=20", "--schedule=linear", f"--storage-path={store.as_uri()}")
    code, output = job.finish()
    assert code == 0, output
    assert list((store / "behind-a-url").glob("checkpoint_*/*.safetensors"))
    assert not list(job.run_dir.glob("checkpoint_*"))
    assert (job.run_dir / "package" / "model.safetensors").exists()
    code, output = launch("behind-a-url", "--resume=behind-a-url", "--max-steps=40").finish()
    assert code == 0, output
    assert "from step 20" in output
    assert [step for step, _ in points(job, "val/loss")] == [0, 20, 40]


def test_a_finished_run_resumed_unchanged_is_shown_again(launch: Launch, undisturbed: Job) -> None:
    job = launch("undisturbed", "--resume=undisturbed")
    code, output = job.finish()
    assert code == 0
    assert "is finished" in output
    assert "registry" in output


@pytest.mark.slow
def test_an_elastic_run_uses_the_available_workers_and_takes_the_same_steps(launch: Launch, undisturbed: Job) -> None:
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
@pytest.mark.release
@pytest.mark.parametrize("kind", ["a package's folder", "GPT-2 in the hub's cache"])
def test_fine_tuning_names_its_parent_and_stops_at_the_requested_training_loss(
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


@pytest.mark.slow
def test_an_outage_of_the_tracking_server_loses_no_step_and_no_point(launch: Launch, tmp_path: Path) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    try:
        server.await_answer()
        job = launch("outage", "--max-steps=1000", MLFLOW_TRACKING_URI=server.uri)
        job.await_line(r"step +20 \| validation")
        server.kill()
        job.await_line(r"step +120 \| validation")
        server.start()
        code, output = job.finish()
        assert code == 0, output
        assert [step for step, _ in points(job, "train/loss")] == list(range(5, 1001, 5))
        assert [step for step, _ in points(job, "val/loss")] == list(range(0, 1001, 20))
        assert mlflow_client(job).get_run(run_id(job)).info.status == "FINISHED"
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.release
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
