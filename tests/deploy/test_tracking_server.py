"""The tracking server of `mlflow/compose.yaml`: the file itself, and the server in use by several people."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptcore.config import ModelConfig
from gptcore.errors import HubError, TrainingError
from gptcore.hub import resolve
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import load_tokenizer
from serve_app.settings import ServeSettings
from tests.deploy.conftest import COMPOSE, ENV_EXAMPLE, Store, Team, named_secrets, services
from tests.refusals import one_error
from tests.serve_app.running import running
from tests.system.conftest import ROOT, SMALL, environment
from train_job.tracking import runs as tracking
from train_job.tracking.registry import Published, Validation, publish
from train_job.tracking.spool import Spool

FOLDER = COMPOSE.parent
README = (FOLDER / "README.md").read_text()
PASSWORDS = {"ada": "a long password of her own", "bo": "a long password of his own"}


# --- The files --------------------------------------------------------------------------------------------------


def test_the_compose_file_follows_the_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec, a parser of compose files, is missing")
    parsed = compose_spec.PyCompose.from_yaml(COMPOSE.read_text())
    assert set(parsed.service_names()) == {"mlflow", "postgres", "s3"}
    with pytest.raises(ValueError, match="imagee"):  # so a slip of the pen would be found
        compose_spec.PyCompose.from_yaml(COMPOSE.read_text().replace("image:", "imagee:"))


def compose_command() -> list[str]:
    """The command of Docker Compose, the plugin or the older program. Skips the test if there is neither."""
    for command in (["docker", "compose"], ["docker-compose"]):
        found = shutil.which(command[0])
        if found and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    pytest.skip("Docker's Compose is not installed")


def test_compose_reads_the_file_as_these_tests_do_and_refuses_to_start_without_secrets(
    dotenv: dict[str, str], tmp_path: Path
) -> None:
    def config() -> subprocess.CompletedProcess[str]:
        command = [*compose_command(), "--env-file", str(tmp_path / ".env"), "-f", str(COMPOSE), "config"]
        return subprocess.run(command, capture_output=True, text=True)

    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in dotenv.items()))
    theirs = yaml.safe_load(config().stdout)["services"]["mlflow"]
    ours = services(dotenv)["mlflow"]
    assert theirs["command"] == ours["command"]
    assert theirs["environment"] == ours["environment"]
    (tmp_path / ".env").write_text(ENV_EXAMPLE.read_text())
    refused = config()
    assert refused.returncode != 0
    assert "make .env as README.md says" in refused.stderr


def test_the_readmes_command_makes_an_env_with_every_secret_that_compose_needs(tmp_path: Path) -> None:
    shutil.copy(ENV_EXAMPLE, tmp_path)
    [command] = re.findall(r"^\(umask .*$", README, re.MULTILINE)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert set(made) == set(named_secrets()) == set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert len(set(made.values())) == len(made)
    assert all(len(value) >= 32 for value in made.values())
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


def test_no_secret_and_no_python_is_in_the_folder() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", FOLDER / ".env"], cwd=ROOT)
    assert ignored.returncode == 0, "git would take mlflow/.env"
    modules = [file for file in FOLDER.glob("**/*.py") if "artifacts" not in file.parts]  # models keep their code there
    assert modules == [], "it would shadow the library"
    for name, value in re.findall(r"(\w*(?:PASSWORD|SECRET)\w*): *(\S+)", COMPOSE.read_text()):
        assert value.startswith("${"), f"{name} has a value of its own"


def test_images_are_pinned_and_mlflow_has_the_clients_version(dotenv: dict[str, str]) -> None:
    images = {name: service["image"].partition(":")[2] for name, service in services(dotenv).items()}
    assert all(re.search(r"\d+\.\d+", tag) for tag in images.values()), images
    [pinned] = re.findall(r"^mlflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert images["mlflow"] == f"v{pinned}-full"


def test_only_one_port_is_open_and_the_stores_reach_nothing(dotenv: dict[str, str]) -> None:
    found = services(dotenv)
    assert {name: service.get("ports") for name, service in found.items()} == {
        "mlflow": ["127.0.0.1:5000:5000"],
        "postgres": None,
        "s3": None,
    }
    assert yaml.safe_load(COMPOSE.read_text())["networks"]["inside"] == {"internal": True}
    assert {name: service["networks"] for name, service in found.items() if name != "mlflow"} == {
        "postgres": ["inside"],
        "s3": ["inside"],
    }
    assert not found["mlflow"]["user"].startswith(("0", "root"))
    assert all(service["healthcheck"]["test"][0] == "CMD" for service in found.values())


# --- The server -------------------------------------------------------------------------------------------------


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture(autouse=True)
def _nobody_else_meets_this_server() -> Iterator[None]:
    """Resets what MLflow's client keeps for the process."""
    yield
    import mlflow

    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def members(team: Team) -> Team:
    """The server with an account for each member, made as the README says."""
    [command] = re.findall(r"^curl .*?\n\n?(?=```)", README, re.MULTILINE | re.DOTALL)
    for name, password in PASSWORDS.items():
        here = command.replace("http://127.0.0.1:5000", team.uri)
        here = here.replace("ada", name).replace("twelve characters or more", password)
        made = subprocess.run(["bash", "-c", here], env=team.dotenv | {"PATH": "/usr/bin:/bin"}, capture_output=True)
        assert made.returncode == 0, made
    return team


def be(monkeypatch: pytest.MonkeyPatch, team: Team, name: str, password: str | None = None) -> None:
    """Gives this process a member's environment, as in the README, without a key for the store."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password or PASSWORDS[name])


def test_requests_without_a_password_or_with_another_host_name_are_refused(members: Team) -> None:
    ada = basic("ada", PASSWORDS["ada"])
    assert members.status(SEARCH, Authorization=ada) == 200
    assert members.status("/health") == 200
    assert members.status("/") == 401
    assert members.status(SEARCH) == 401
    assert members.status(SEARCH, Authorization=basic("ada", "wrong")) == 401
    assert members.status(SEARCH, Authorization=ada, Host="rebound.example.org") == 403


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    config = ModelConfig(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2, context_length=64)
    folder = tmp_path_factory.mktemp("made") / "package"
    return save_package(folder, config, GPT(config).state_dict(), load_tokenizer("bytes", None), {})


def published(team: Team, package: Package, folder: Path, name: str, bits: float) -> tuple[str, Published]:
    """Does what the job does at its end, as the current user. Returns (run, version)."""
    run_id = tracking.start_run(team.uri, {"preset": "quick"}, experiment="shared")
    spool = Spool(folder, run_id, team.uri)
    spool.metrics(1, {"train/loss": 2.0})
    (folder / "curve.txt").write_text("curve")
    spool.artifact(folder / "curve.txt", "figures")
    assert spool.close(60) == 0
    version = publish(team.uri, run_id, package, Validation("f", lambda _: bits), name=name, promote="always")
    tracking.finish_run(team.uri, run_id)
    return run_id, version


def test_members_share_an_experiment_and_a_model_and_cannot_delete_each_others_work(
    members: Team, s3: Store, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient, MlflowException

    be(monkeypatch, members, "ada")
    run_id, first = published(members, package, tmp_path / "ada", "shared", 2.0)
    stored = [name for name in s3.files("mlflow/artifacts") if f"/{run_id}/" in name]
    assert [name.rpartition("/artifacts/")[2] for name in stored] == ["figures/curve.txt"]

    be(monkeypatch, members, "bo")
    other, second = published(members, package, tmp_path / "bo", "shared", 1.9)
    assert (first.version, second.version) == ("1", "2")
    client = MlflowClient(members.uri)
    assert client.get_model_version_by_alias("shared", "champion").run_id == other
    with pytest.raises(MlflowException, match="403"):
        client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(MlflowException, match="403"):
        client.delete_registered_model("shared")

    be(monkeypatch, members, "admin", members.env["MLFLOW_AUTH_ADMIN_PASSWORD"])
    MlflowClient(members.uri).delete_registered_model("shared")


def test_the_service_serves_the_servers_champion_without_a_key_for_the_store(
    members: Team, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, members, "ada")
    run_id, version = published(members, package, tmp_path / "ada", "served", 2.0)
    be(monkeypatch, members, "bo")
    assert open_package(resolve("models:/served@champion", members.uri, tmp_path)).info == package.info
    settings = ServeSettings(
        model="models:/served@champion",
        tracking_uri=members.uri,
        slots=2,
        threads=1,
        backend="torch",
        dtype="float32",
    )
    with running(settings) as service:
        body = json.dumps({"prompt": "a", "max_new_tokens": 4, "ignore_eos": True}).encode()
        with urllib.request.urlopen(f"{service.url}/generate", data=body) as answer:
            reply = json.load(answer)
        with urllib.request.urlopen(f"{service.url}/models") as answer:
            listed = json.load(answer)
    assert reply["version"] == version.version
    assert run_id in json.dumps(listed)


def run_job(home: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train_job/run.py", *SMALL, *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment(home, RAY_ADDRESS="local", **env), capture_output=True, text=True
    )


def test_a_wrong_password_ends_the_job_with_one_line_and_exit_code_2_before_it_starts(
    members: Team, text_file: Path, tmp_path: Path
) -> None:
    env = members.client(MLFLOW_TRACKING_USERNAME="ada", MLFLOW_TRACKING_PASSWORD="not hers")
    done = run_job(tmp_path, f"--data={text_file}", "--name=wrong", **env)
    assert done.returncode == 2, done.stderr
    assert one_error(done.stderr) == (
        f"error: MLflow at {members.uri} does not accept user 'ada' with this password; set MLFLOW_TRACKING_USERNAME "
        "and MLFLOW_TRACKING_PASSWORD\n"
    )
    assert not list((tmp_path / "runs").glob("*"))


def test_a_wrong_password_is_one_line_wherever_a_model_is_looked_up(
    members: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(monkeypatch, members, "ada", "not hers")
    with pytest.raises(TrainingError, match="does not accept user 'ada' with this password"):
        tracking.start_run(members.uri, {})
    for name in ("models:/gpt@champion", "models:/gpt/1", "runs:/0123456789abcdef0123456789abcdef/model"):
        with pytest.raises(HubError, match=r"does not let this user read .*; set MLFLOW_TRACKING_USERNAME") as caught:
            resolve(name, members.uri)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_job_logs_and_registers_through_the_server_and_generate_reads_from_it(
    members: Team, s3: Store, text_file: Path, tmp_path: Path
) -> None:
    env = members.client(MLFLOW_TRACKING_USERNAME="ada", MLFLOW_TRACKING_PASSWORD=PASSWORDS["ada"])
    done = run_job(tmp_path, f"--data={text_file}", "--name=first", "--max-steps=20", "--register-as=job", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job version 1, now @champion" in done.stdout
    assert PASSWORDS["ada"] not in done.stdout + done.stderr
    run_id = json.loads((tmp_path / "runs" / "first" / "run.json").read_text())["run_id"]
    stored = [name.rpartition("/artifacts/")[2] for name in s3.files("mlflow/artifacts") if f"/{run_id}/" in name]
    assert {"config.yaml", "samples.json", "figures/loss_curve.png"} <= set(stored)
    bo = members.client(MLFLOW_TRACKING_USERNAME="bo", MLFLOW_TRACKING_PASSWORD=PASSWORDS["bo"])
    command = [sys.executable, "-m", "gptcore.generate", "models:/job@champion", "--prompt", "10 green", "--greedy"]
    said = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, **bo), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_the_readmes_upgrade_command_finds_the_database(team: Team, tmp_path: Path) -> None:
    [command] = re.findall(r"docker compose run --rm mlflow (mlflow db upgrade \S+)", README)
    done = subprocess.run(command.split(), cwd=tmp_path, env=team.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_server_keeps_nothing_in_its_container(members: Team) -> None:
    left: list[Any] = list(members.folder.rglob("*"))
    assert left == []
