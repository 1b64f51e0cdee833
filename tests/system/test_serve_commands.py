"""The commands that start the service, each on its own, as in docs/serving.md."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ports import free_port
from tests.serve_app.conftest import MakePackage, TestRegistry, make_package, registry_in
from tests.system.conftest import BIN, ROOT, Cluster, environment
from tests.system.serving import BODY, QUICK, START_SECONDS, Load, Service, said, served
from tests.waiting import eventually

__all__ = ["make_package"]  # a fixture, used here too


@pytest.fixture(scope="module")
def registry(cluster: Cluster, make_package: MakePackage) -> Iterator[TestRegistry]:
    """The embedded MLflow of the cluster's home."""
    with registry_in(cluster.home, make_package) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.release
def test_from_zero_replicas_the_first_request_is_answered(cluster: Cluster, registry: TestRegistry):
    registry.publish("asleep", seed=1)
    port = free_port()
    settings = QUICK | {"model": "models:/asleep@champion", "port": port, "min_replicas": 0, "downscale_delay_s": 2}
    with served(cluster, "serve_app:build_app", *said(**settings), port=port) as service:
        eventually(lambda: not service.replicas(), "no replica is kept", 90)
        assert service.ask()[0] == 200


@pytest.mark.slow
def test_serve_run_takes_its_settings_from_the_environment(cluster: Cluster, registry: TestRegistry):
    registry.publish("named", seed=1)
    port = free_port()
    env = {
        "GPT_MODEL": "models:/named@champion",
        "GPT_PORT": str(port),
        "GPT_API_KEYS": "one,two",
        "GPT_BACKEND": "torch",
    }
    with served(cluster, "serve_app:app", port=port, **env) as service:
        assert service.ask()[0] == 401
        assert service.ask(headers={"authorization": "Bearer two"})[0] == 200


@pytest.mark.slow
def test_serve_deploy_applies_our_config_and_its_changes_without_a_failed_request(
    cluster: Cluster, registry: TestRegistry, tmp_path: Path
):
    registry.publish("gpt", seed=1)
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = port = free_port()
    env = environment(cluster.home, RAY_DASHBOARD_ADDRESS=cluster.dashboard)

    def deploy(**args: Any) -> None:
        config["applications"][0]["args"] |= args
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        subprocess.run([BIN / "serve", "deploy", tmp_path / "serve.yaml"], cwd=ROOT, env=env, check=True)

    service = Service(f"http://127.0.0.1:{port}", cluster)
    deploy()
    try:
        eventually(service.is_ready, "the service is ready", START_SECONDS)
        assert service.version()
        (before,) = service.replicas()
        with Load(service, clients=2) as load:
            deploy(max_new_tokens=9)
            too_many = BODY | {"max_new_tokens": 10}
            eventually(lambda: service.ask(body=too_many)[0] == 400, "the new setting holds", START_SECONDS)
            eventually(lambda: not before.is_running(), "the old replica has left", 60)
        assert load.failed == {}
        assert load.answered() > 20
    finally:
        subprocess.run([BIN / "serve", "shutdown", "--yes"], cwd=ROOT, env=env, check=True)


def test_serve_build_writes_a_config_of_the_application(tmp_path: Path):
    target = tmp_path / "built.yaml"
    subprocess.run([BIN / "serve", "build", "serve_app:app", "-o", target], cwd=ROOT, check=True, capture_output=True)
    (application,) = yaml.safe_load(target.read_text())["applications"]
    assert application["import_path"] == "serve_app:app"
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"]["max_replicas"] == 1


@pytest.mark.parametrize("said", [pytest.param("serve_app:app", marks=pytest.mark.slow), "serve_app:build_app"])
def test_a_used_port_ends_serve_run_with_one_line(said: str):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        env = os.environ | {"GPT_PORT": str(port), "RAY_ADDRESS": "local"}
        ended = subprocess.run([BIN / "serve", "run", said], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == (
        f"Error: cannot listen on 127.0.0.1:{port}: it is in use; choose another port, such as port={port + 1}"
    )
    assert "Traceback" not in ended.stderr


def test_a_wrong_setting_ends_serve_run_with_one_line():
    ended = subprocess.run(
        [BIN / "serve", "run", "serve_app:build_app", "max_replica=4"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == (
        "Error: there is no setting 'max_replica'. Did you mean 'max_replicas'?"
    )
    assert "Traceback" not in ended.stderr
