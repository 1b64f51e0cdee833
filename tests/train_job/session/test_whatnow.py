"""The commands that a run prints at its end: they fit the run's location and a shell can run them as printed."""

import shlex
import sys
from pathlib import Path

import pytest

from train_job.session.whatnow import Ended, lines, script_command

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout, with no environment variables set."""
    for name in ("GPT_FOUNDRY_HOME", "GPT_PORT", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)


def commands(ended: Ended) -> dict[str, list[str]]:
    """The printed commands by the step's name, each split as a shell does."""
    said = {line[2:11].strip(): line[11:].strip() for line in lines(ended)[1:]}
    return {
        name: [text] if text.startswith("http") else shlex.split(text, comments=True) for name, text in said.items()
    }


def test_a_finished_run_prints_commands_to_serve_chat_view_promote_and_resume() -> None:
    package = ROOT / "runs" / "my run" / "package"
    uri = f"sqlite:///{ROOT}/mlflow/mlflow.db"
    resume = script_command("train_job/run.py", "--resume", "my run")
    ended = Ended(uri, "3", "abc", package, "gpt version 2", f"{resume} --promote always", f"{resume} --max-steps 20")
    said = commands(ended)
    assert said["serve it"][1:] == ["run", "serve_app:build_app", "model=runs/my run/package"]
    assert Path(said["serve it"][0]) == Path(sys.executable).with_name("serve").relative_to(ROOT)
    python = str(Path(sys.executable).relative_to(ROOT))
    assert said["chat"] == [python, "-m", "serve_app.chat"]
    assert said["ask it"] == [python, "-m", "gptcore.generate", "runs/my run/package", "--prompt", "The"]
    assert said["see runs"] == ["make", "ui"]
    assert said["its page"] == ["http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"]
    assert said["promote"] == [python, "train_job/run.py", "--resume", "my run", "--promote", "always"]
    assert said["go on"][-2:] == ["--max-steps", "20"]


def test_no_command_promotes_a_champion_or_serves_a_run_without_a_package() -> None:
    said = commands(Ended("sqlite:////else.db", "1", "abc", resume="python train_job/run.py --resume x"))
    assert said.keys() == {"see runs", "its page", "all runs", "go on"}
    assert said["see runs"] == ["MLFLOW_TRACKING_URI=sqlite:////else.db", "make", "ui"]
    assert lines(Ended("sqlite:////else.db")) == [], "nothing was begun"


@pytest.mark.parametrize("uri", ["http://me:sec/ret@tracker:5000", "postgresql://me:sec/ret@tracker/mlflow"])
def test_the_address_of_the_tracking_server_is_printed_without_its_password(uri: str) -> None:
    told = "\n".join(lines(Ended(uri, "1", "abc")))
    assert "ret@" not in told
    assert ("http://tracker:5000/#/experiments/1/runs/abc" in told) == uri.startswith("http")


def test_the_commands_are_complete_in_another_folder_and_with_another_home_and_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "a home"))
    monkeypatch.setenv("GPT_PORT", "8123")
    resume = script_command("train_job/run.py", "--resume", "x")
    assert shlex.split(resume)[:4] == [f"GPT_FOUNDRY_HOME={tmp_path / 'a home'}", sys.executable, "-m", "train_job.run"]
    uri = f"sqlite:///{tmp_path / 'a home'}/mlflow/mlflow.db"
    said = commands(Ended(uri, "1", "abc", tmp_path / "a home" / "runs" / "x" / "package"))
    assert said["serve it"][-1] == "model=a home/runs/x/package"
    assert said["chat"][-2:] == ["--url", "http://127.0.0.1:8123"]
    assert said["see runs"] == [f"GPT_FOUNDRY_HOME={tmp_path / 'a home'}", "make", "-C", str(ROOT), "ui"]


def test_a_job_on_a_cluster_prints_its_host_and_absolute_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    ended = Ended("sqlite:///x", "1", "abc", ROOT / "runs" / "x" / "package")
    assert f"in {ROOT})" in lines(ended)[0]
    assert commands(ended)["serve it"][-1] == f"model={ROOT}/runs/x/package"
