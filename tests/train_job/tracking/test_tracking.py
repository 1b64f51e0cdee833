"""train_job.tracking, against a real tracking server that is killed and restarted."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcore.config import ModelConfig
from gptcore.errors import TrainingError
from gptcore.home import default_tracking_uri
from gptcore.hub import resolve
from gptcore.model import GPT
from gptcore.package import open_package, save_package
from gptcore.tokenizer import load_tokenizer
from tests.ports import free_port
from tests.waiting import await_server, eventually, is_up
from train_job.tracking import runs as tracking
from train_job.tracking import spool as spooling
from train_job.tracking.__main__ import main
from train_job.tracking.client import artifact_root, check_server
from train_job.tracking.registry import Validation, publish
from train_job.tracking.runs import DatasetUse, SystemMetrics
from train_job.tracking.spool import Spool, undelivered

CONFIG = {"preset": "quick", "learning_rate": 3e-3, "model": {"hidden_size": 256}, "name": None}


class Server:
    """`mlflow server` on a free port of the loopback interface, with its database in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes that nothing here asks for
        with open(self.folder / "server.log", "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        await_server(self.process, lambda: is_up(f"{self.uri}/health"), self.folder / "server.log", 300)

    def kill(self) -> None:
        """Kills the server's whole process group, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('embedded')}/mlflow/mlflow.db"


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


def test_an_outage_loses_and_repeats_no_point_and_never_blocks_the_caller(server: Server, tmp_path: Path):
    run_id = tracking.start_run(server.uri, CONFIG)
    spool = Spool(tmp_path / "spool", run_id, server.uri)
    taken: list[float] = []

    def train(steps: range) -> None:
        for step in steps:
            before = time.perf_counter()
            spool.metrics(step, {"train/loss": 1 / step, "tokens_seen": 64 * step})
            taken.append(time.perf_counter() - before)

    train(range(1, 201))
    eventually(lambda: undelivered(spool.folder) == 0, "everything is delivered", 60)
    server.kill()
    (tmp_path / "curve.txt").write_text("early")
    train(range(201, 1501))
    spool.artifact(tmp_path / "curve.txt", "plots")
    (tmp_path / "curve.txt").write_text("late")
    assert spool.close(timeout_s=3) == 1301

    server.start()
    resumed = Spool(tmp_path / "spool", run_id, server.uri)
    spool = resumed
    train(range(1401, 1601))  # from a checkpoint at step 1400
    assert resumed.close(timeout_s=60) == 0
    assert sorted(taken)[-4] < 0.5  # a busy machine may have taken the core away three times
    assert history(server.uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 1601)]
    assert [step for step, _ in history(server.uri, run_id, "tokens_seen")] == list(range(1, 1601))
    copy = client(server.uri).download_artifacts(run_id, "plots/curve.txt", str(tmp_path))
    assert Path(copy).read_text() == "late"


def test_a_package_is_published_through_a_server_and_read_back_from_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back afterwards: publishing sets it
    tokenizer = load_tokenizer("bytes", None)
    config = ModelConfig(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2, context_length=64)
    package = save_package(tmp_path / "package", config, GPT(config).state_dict(), tokenizer, {})
    for fingerprint in ("one", "two"):  # the second time, the champion is fetched and judged on our text
        run_id = tracking.start_run(server.uri, CONFIG)
        validation = Validation(fingerprint, lambda judged: 2.0)
        published = publish(server.uri, run_id, package, validation, name="remote")
    assert (published.version, published.promoted) == ("2", False)
    assert "no better" in published.reason
    assert "models:/remote@champion" in client(server.uri).get_registered_model("remote").description
    champion = open_package(resolve("models:/remote@champion", server.uri))
    assert champion.info == package.info
    mlflow.set_tracking_uri(None)


def test_a_batch_sent_twice_is_kept_once(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    spool = Spool(tmp_path, run_id, database)
    for step in range(2500):
        spool.metrics(step, {"train/loss": float("nan") if step == 7 else step})
    assert spool.close(60) == 0
    state = json.loads((tmp_path / "delivered.json").read_text())
    (tmp_path / "delivered.json").write_text(json.dumps(state | {"offset": 0}))  # killed before it could remember
    assert main(["deliver", str(tmp_path)]) == 0
    assert len(history(database, run_id, "train/loss")) == 2500


def test_a_spool_in_a_new_folder_drops_the_steps_that_the_server_already_has(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    for folder, steps in (("one", range(1, 11)), ("two", range(6, 21))):
        spool = Spool(tmp_path / folder, run_id, database)
        for step in steps:
            spool.metrics(step, {"train/loss": step})
        spool.metrics(steps[-1], {"val/loss": 1.0})  # a second call at the same step is another metric's first
        assert spool.close(60) == 0
    assert [step for step, _ in history(database, run_id, "train/loss")] == list(range(1, 21))
    assert [step for step, _ in history(database, run_id, "val/loss")] == [10, 20]


def test_a_line_cut_off_by_a_crash_does_not_damage_the_next(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    (tmp_path / "lines.jsonl").write_text('{"step": 1, "time": 5, "values": {"train/loss": 1.0}}\n{"step": 2, "ti')
    spool = Spool(tmp_path, run_id, database)
    spool.metrics(1, {"train/loss": 9.0})
    spool.metrics(2, {"train/loss": 2.0})
    assert spool.close(60) == 0
    assert history(database, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_points_that_mlflow_refuses_are_set_aside_and_the_rest_is_delivered(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    spool = Spool(tmp_path, run_id, database)
    spool.metrics(1, {"no?such*name": 1.0})
    spool.artifact(tmp_path / "never-written.png")
    spool.metrics(1, {"train/loss": 1.0})
    assert spool.close(60) == 0
    assert "no?such*name" in (tmp_path / "refused.jsonl").read_text()
    assert history(database, run_id, "train/loss") == [(1, 1.0)]


def test_a_run_records_its_settings_its_origin_and_its_data(database: str):
    train = DatasetUse("train", "builtin", "builtin", "ab" * 32, num_bytes=900, num_tokens=300)
    validation = DatasetUse("validation", "web", "https://example.com/a.txt", "cd" * 32, num_bytes=100, num_tokens=30)
    run_id = tracking.start_run(
        database, CONFIG, name="first", datasets=[train, validation], tags={"stage": "test"}, experiment="other"
    )
    run = client(database).get_run(run_id)
    assert run.info.run_name == "first"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"preset": "quick", "learning_rate": "0.003", "model.hidden_size": "256", "name": "None"}
    wanted = {"mlflow.user", "mlflow.source.name", "mlflow.source.type", "hardware.cpu", "hardware.cores"}
    assert wanted | {"hardware.gpus", "version.torch", "stage"} <= run.data.tags.keys()
    used = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert used["train"].digest == ("ab" * 32)[:32]
    assert json.loads(used["train"].profile) == {"bytes": 900, "tokens": 300, "fingerprint": "ab" * 32}
    assert json.loads(used["validation"].source) == {"url": "https://example.com/a.txt"}
    assert run.info.artifact_uri.startswith(Path(database.removeprefix("sqlite:///")).parent.as_uri())


def test_an_experiment_gets_a_tag_and_a_description_unless_the_user_wrote_one(database: str):
    from train_job.tracking.pages import KIND, NOTE, VIEW_TAG

    mlflow = client(database)
    old = mlflow.create_experiment("old")
    mlflow.set_experiment_tag(old, KIND, "genai_development_inferred")  # the UI's guess
    mlflow.set_experiment_tag(old, NOTE, "our own words")
    for name in ("looks", "old"):
        run_id = tracking.start_run(database, CONFIG, experiment=name)
    made = mlflow.get_experiment_by_name("looks")
    assert made.tags[KIND] == "custom_model_development"
    assert f"(#/experiments/{made.experiment_id}/runs?" in made.tags[NOTE]
    columns = json.loads(json.loads(made.tags[VIEW_TAG])["state"])["selectedColumns"]
    assert columns[:3] == [f"metrics.`{name}`" for name in ("val/bits_per_byte", "val/loss", "train/loss")]
    assert tracking.experiment_of(database, run_id) == old
    tags = mlflow.get_experiment(old).tags
    assert (tags[KIND], tags[NOTE]) == ("custom_model_development", "our own words")
    mlflow.set_experiment_tag(old, KIND, "genai_development")  # a person's choice
    tracking.start_run(database, CONFIG, experiment="old")
    assert mlflow.get_experiment(old).tags[KIND] == "genai_development"


def test_git_tags_name_the_commit_and_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "train_job" / "tracking" / "runs.py"))
    tags = tracking.source_tags()
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "a.txt").write_text("two")
    assert tracking.source_tags()["git.dirty"] == "true"


def test_a_finished_run_can_be_resumed_and_closed_again(database: str):
    run_id = tracking.start_run(database, CONFIG)
    for status in ("KILLED", "FINISHED"):
        tracking.finish_run(database, run_id, status)
        assert client(database).get_run(run_id).info.status == status
        tracking.resume_run(database, run_id)
        assert client(database).get_run(run_id).info.status == "RUNNING"
    with pytest.raises(TrainingError, match="0123456789abcdef"):
        tracking.resume_run(database, "0123456789abcdef0123456789abcdef")


def test_closing_a_run_twice_keeps_the_first_end(database: str):
    run_id = tracking.start_run(database, CONFIG)
    ends = []
    for _ in range(2):
        tracking.finish_run(database, run_id)
        ends.append(client(database).get_run(run_id).info.end_time)
    assert ends[0] == ends[1]


def test_an_unreachable_server_is_reported_at_once_without_its_password():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TrainingError, match=r"answers at http://127\.0\.0\.1") as caught:
            tracking.start_run(uri, CONFIG)
    assert time.monotonic() - began < 6
    assert "secret" not in str(caught.value)


def test_a_spool_neither_stores_nor_prints_the_password(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        spool = Spool(tmp_path, "0" * 32, f"http://me:secret@{address}")
        spool.metrics(1, {"train/loss": 1.0})
        spool.close(timeout_s=5)
    assert "MLflow is away" in caplog.text
    assert address in (tmp_path / "spool.json").read_text()
    for text in (caplog.text, *(file.read_text() for file in tmp_path.iterdir())):
        assert "secret" not in text


def test_delivering_takes_the_password_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def away(uri: str) -> None:
        asked.append(uri)
        raise TrainingError("away")

    monkeypatch.setattr(spooling, "check_server", away)
    spool = {"run_id": "0" * 32, "tracking_uri": "http://host:5000"}
    (tmp_path / "spool.json").write_text(json.dumps(spool))
    for environment in ("http://me:secret@host:5000", "http://me:secret@elsewhere"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
        assert main(["deliver", str(tmp_path)]) == 2
    assert asked == ["http://me:secret@host:5000", "http://host:5000"]


def test_a_run_that_mlflow_refuses_during_its_start_is_not_left_running(database: str):
    with pytest.raises(TrainingError, match="refused"):
        tracking.start_run(database, {"no?such*name": 1}, name="refused")
    [run] = client(database).search_runs(["1"], "attributes.run_name = 'refused'")
    assert run.info.status == "FAILED"


def test_a_server_that_accepts_but_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TrainingError, match="no tracking server answers"):
            check_server(f"http://127.0.0.1:{port}", timeout_s=0.3)


def test_an_unknown_kind_of_tracking_uri_is_refused():
    with pytest.raises(TrainingError, match=r"expected http\(s\)"):
        check_server("./mlruns")


def test_a_deleted_experiment_is_named_with_the_way_to_restore_it(database: str):
    tracking.start_run(database, CONFIG, experiment="gone")
    experiment = client(database).get_experiment_by_name("gone")
    client(database).delete_experiment(experiment.experiment_id)
    with pytest.raises(TrainingError, match=r"'gone' is deleted.*restore"):
        tracking.start_run(database, CONFIG, experiment="gone")


def test_delivering_a_folder_that_is_not_a_spool_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["deliver", str(tmp_path)]) == 2
    assert "is not a spool" in capsys.readouterr().err


def test_the_tracking_uri_is_absolute_and_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GPT_FOUNDRY_HOME", "here")
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/here/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_tracking_uri() == "http://127.0.0.1:5000"
    assert artifact_root(default_tracking_uri()) is None


def test_system_metrics_reach_the_run(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    spool = Spool(tmp_path, run_id, database)
    monitor = SystemMetrics(spool, interval_s=0.2)
    eventually(
        lambda: "system/cpu_utilization_percentage" in (tmp_path / "lines.jsonl").read_text(),
        "a system metric is there",
        60,
    )
    monitor.stop()
    assert spool.close(60) == 0
    points = history(database, run_id, "system/system_memory_usage_megabytes")
    assert points
    assert points[0][1] > 0


def test_a_table_is_marked_for_the_ui(database: str, tmp_path: Path):
    run_id = tracking.start_run(database, CONFIG)
    spool = Spool(tmp_path / "spool", run_id, database)
    (tmp_path / "samples.json").write_text('{"columns": ["step"], "data": [[1]]}')
    for _ in range(2):
        spool.artifact(tmp_path / "samples.json", table=True)
    assert spool.close(60) == 0
    tag = client(database).get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(tag) == [{"path": "samples.json", "type": "table"}]


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys, train_job.tracking.runs; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_invalid_database_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database")
    for path, problem in ((tmp_path, "is a folder, expected a file"), (tmp_path / "notes.txt", "is not an SQLite")):
        with pytest.raises(TrainingError, match=problem):
            check_server(f"sqlite:///{path}")


def test_a_database_that_never_answers_is_given_up_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(TrainingError, match=r"no answer within 0\.5 s"),
    ):
        check_server(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x", timeout_s=0.5)


@pytest.mark.slow
def test_runs_that_begin_together_in_a_new_home_share_one_database(tmp_path: Path):
    code = (
        "import sys; from train_job.tracking.client import check_server, connected; check_server(sys.argv[1])\n"
        "with connected(sys.argv[1]) as client: print(len(client.search_experiments()))"
    )
    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    together = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in together:
        said, errors = process.communicate()
        assert said == "1\n", errors


def test_a_disk_that_is_full_only_when_lines_are_synced_is_named(tmp_path, monkeypatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    spool = Spool(tmp_path, "0" * 32, f"sqlite:///{tmp_path}/mlflow.db")
    spool.metrics(1, {"train/loss": 2.0})
    spool.sync()
    with monkeypatch.context() as patched:
        patched.setattr("gptcore.files.os.fsync", full)
        with pytest.raises(TrainingError, match="is full"):
            spool.sync()
    spool.close(0)
