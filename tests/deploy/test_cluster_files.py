"""The files that start clusters: Ray accepts them, their commands exist, and they contain no secret.

moto's EC2 stands in for the cloud. crd/test_kuberay.py checks the files for KubeRay.
"""

import copy
import functools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import click
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.command_runner import DockerCommandRunner
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.updater import NodeUpdater
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli, start, stop
from ray.serve.schema import ServeDeploySchema

from serve_app.deployment import build_app
from serve_app.settings import FIELDS, PREFIX, load_settings
from tests.deploy.crd.schema import JOB, OPERATED, SERVICE, STORAGE, Mistake, cluster_of, read, templates
from tests.system.conftest import ROOT
from train_job.cli import parse_settings
from train_job.config import build_config

LAUNCHED = ["cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/cluster-onprem.yaml"]
FILES = [*LAUNCHED, *OPERATED, STORAGE, "deploy/serve.yaml"]


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The config that `ray up` makes of a file before it calls the cloud. Raises if Ray refuses the file."""
    ready: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def environment(name: str) -> dict[str, Any]:
    """The nodes' environment variables. The value is None if it comes from a Secret."""
    if name in LAUNCHED:
        options = read(name)["docker"]["run_options"]
        return dict(option.removeprefix("-e ").split("=", 1) for option in options if option.startswith("-e "))
    entries = [entry for t in templates(read(name)) for c in t["spec"]["containers"] for entry in c.get("env", [])]
    return {entry["name"]: entry.get("value") for entry in entries}


# Ray's launcher


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_accepts_the_file(name: str):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(name), schema)
    prepared(read(name))


@pytest.mark.parametrize("name", LAUNCHED[:2])
def test_machines_with_gpus_scale_from_zero(name: str):
    types = prepared(read(name))["available_node_types"]
    assert types["gpu"]["min_workers"] == types["cpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]
    assert types["head"]["resources"] == {"CPU": 0}, "work on the head would keep the others from starting"


MISTAKES: dict[str, Mistake] = {
    "an unknown field": lambda c: c.update(max_worker=3),
    "a type of machine that is not there": lambda c: c.update(head_node_type="heat"),
    "more machines than the most": lambda c: c["available_node_types"]["gpu"].update(min_workers=99),
    "a container without an image": lambda c: c["docker"].pop("image"),
    "an unknown field of a type": lambda c: c["available_node_types"]["gpu"].update(min_worker=0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_ray_up_refuses_a_bad_file(mistake: str):
    config = read("cluster.yaml")
    MISTAKES[mistake](config)
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        prepared(config)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_start_accepts_the_commands_and_keeps_the_dashboard_on_loopback(name: str):
    config = read(name)
    (head,) = [start_flags(command) for command in config["head_start_ray_commands"] if "ray start" in command]
    (worker,) = [start_flags(command) for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml", "where `ray up` puts it"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    for command in [config["head_start_ray_commands"][0], config["worker_start_ray_commands"][0]]:
        stop.make_context("ray stop", shlex.split(command)[2:])


def start_flags(command: str) -> dict[str, Any]:
    """The flags of a `ray start` command, read by Ray's own parser."""
    *_, last = command.split("; ")
    ray_, start_, *flags = shlex.split(last)
    assert (ray_, start_) == ("ray", "start")
    return start.make_context("ray start", flags).params


def test_ray_start_refuses_an_unknown_flag():
    with pytest.raises(click.UsageError):
        start_flags("ray start --head --dashbord-host=127.0.0.1")


def test_the_launchers_differ_only_in_machines_and_addresses():
    def common(name: str) -> dict[str, Any]:
        config = read(name)
        same = ["cluster_name", "file_mounts", "head_start_ray_commands", "worker_start_ray_commands"]
        return {key: config[key] for key in same} | {"env": environment(name) | {"MLFLOW_TRACKING_URI": "yours"}}

    assert common(LAUNCHED[1]) == common(LAUNCHED[0])
    assert common(LAUNCHED[2]) == common(LAUNCHED[0])


class Shell:
    """Stands in for a machine that is reached over SSH: records Ray's commands and answers as docker would."""

    ANSWERS = {".Config.Env": b'["HOME=/home/ray"]', "printenv HOME": b"/home/ray", "Running": b"false"}

    def __init__(self) -> None:
        self.ran: list[str] = []

    def check_output(self, command: list[str], *_: Any, **__: Any) -> bytes:
        *ssh, told = command
        self.ran.append(shlex.split(told)[0] if "ssh" in ssh[0] else " ".join(command))
        return next((answer for part, answer in self.ANSWERS.items() if part in told), b"docker")

    check_call = call = check_output


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_machine_has_folder_token_and_environment_before_ray_starts_in_the_container(name: str, tmp_path: Path):
    config, shell, provider = prepared(read(name)), Shell(), MagicMock(provider_config={})
    provider.get_command_runner = lambda prefix, node, auth, cluster, runner, internal, docker: DockerCommandRunner(
        docker,
        log_prefix=prefix,
        node_id=node,
        provider=provider,
        auth_config=auth,
        cluster_name=cluster,
        process_runner=runner,
        use_internal_ip=internal,
    )
    provider.node_tags.return_value, provider.is_terminated.return_value = {}, False
    provider.external_ip.return_value = provider.internal_ip.return_value = "10.0.0.5"
    (token := tmp_path / "auth_token").write_text("any")
    NodeUpdater(
        node_id="any",
        provider=provider,
        provider_config=config["provider"],
        process_runner=shell,
        auth_config=config["auth"] | {"ssh_private_key": "any"},
        cluster_name=config["cluster_name"],
        file_mounts=dict.fromkeys(config["file_mounts"], str(token)),
        docker_config=config["docker"],
        initialization_commands=config["initialization_commands"],
        setup_commands=config["worker_setup_commands"],
        ray_start_commands=config["worker_start_ray_commands"],
        runtime_hash="",
        file_mounts_contents_hash="",
        is_head_node=False,
    ).run()
    for line in shell.ran:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    steps = ["auth_token", *config["initialization_commands"], "docker run", "(ray stop)", "; ray start"]
    found = [next(i for i, line in enumerate(shell.ran) if step in line) for step in steps]
    assert found == sorted(found)
    assert "unset OMP_NUM_THREADS; ray start" in shell.ran[-1]
    run = shlex.split(next(line for line in shell.ran if "docker run" in line).partition("(")[2].rstrip(")"))
    assert {f"{key}={value}" for key, value in environment(name).items()} < set(run)
    mounted = {part.rpartition(":")[2] for flag, part in pairwise(run) if flag == "-v"}
    assert mounted == {"/run/gpt-foundry/auth_token", "/mnt/gpt-foundry"}
    assert run[-2:] == [config["docker"]["image"], "bash"]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """moto's EC2 and IAM, for an account in which `ray up` has run before."""
    moto = pytest.importorskip("moto")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", read("cluster.yaml")["provider"]["region"])
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the key pair
    with moto.mock_aws():
        iam = boto3.client("iam")
        for name in ("gpt-foundry-worker", "ray-autoscaler-v1"):
            iam.create_instance_profile(InstanceProfileName=name)
        iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")
        yield


def test_on_aws_each_type_of_machine_is_launched_and_ray_knows_its_resources(aws: None):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    config = AWSNodeProvider.fillout_available_node_types_resources(prepared(read("cluster.yaml")))
    types = config["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 4
    assert types["cpu"]["resources"]["CPU"] == 8
    assert types["head"]["resources"] == {"CPU": 0}

    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_LAUNCH_CONFIG: "any"}
        provider.create_node(node["node_config"], tags, 1)
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    launched = {instance["InstanceType"] for r in reservations for instance in r["Instances"]}
    assert launched == {node["node_config"]["InstanceType"] for node in types.values()}


# Kubernetes


@pytest.mark.parametrize("name", OPERATED)
def test_rays_autoscaler_reads_the_pods_that_it_may_request(name: str):
    types = autoscaling(name)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["max_workers"] == 8


def test_pods_for_training_scale_from_zero():
    assert autoscaling(JOB)["available_node_types"]["gpu"]["min_workers"] == 0


def autoscaling(name: str) -> dict[str, Any]:
    """The autoscaler config that Ray makes of the file's cluster."""
    cluster = {"metadata": {"name": "any", "namespace": "any"}, "spec": cluster_of(read(name))}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


@pytest.mark.parametrize("name", OPERATED)
def test_no_pod_runs_as_root_or_gains_privileges(name: str):
    for template in templates(read(name)):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


# What the files start


def test_the_job_accepts_the_training_command_and_its_workers_fit_the_pods():
    command, script, *flags = shlex.split(read(JOB)["spec"]["entrypoint"])
    assert (command, script) == ("python", "train_job/run.py")
    config = build_config(parse_settings(flags))
    pod = autoscaling(JOB)["available_node_types"]["gpu"]
    assert config.use_gpu
    assert config.cpus_per_worker == pod["resources"]["CPU"]
    assert config.workers[1] == pod["max_workers"]


def test_ray_and_the_job_accept_the_commands_of_the_docs():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("ray ") and "…" not in line]
    assert {"up", "dashboard", "job", "down", "start", "get-auth-token"} <= {words[1] for words in commands}
    for words in commands:
        command: click.Command = cli
        flags = [word for word in words[1:] if word not in ("&", ">", "/dev/null")]
        while isinstance(command, click.Group):
            command = command.commands[flags.pop(0)]
        command.make_context(words[1], [str(ROOT / word) if word == "cluster.yaml" else word for word in flags])
        if "train_job/run.py" in words:
            build_config(parse_settings(words[words.index("train_job/run.py") + 1 :]))


def served() -> dict[str, Any]:
    """The RayService's Serve config."""
    config: dict[str, Any] = yaml.safe_load(read(SERVICE)["spec"]["serveConfigV2"])
    return config


@pytest.mark.parametrize("config", [served(), read("deploy/serve.yaml")], ids=[SERVICE, "deploy/serve.yaml"])
def test_serve_accepts_the_config_and_the_service_its_settings(config: dict[str, Any]):
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serve_app:build_app"
    build_app(application.args)


def test_a_replica_fits_its_pod_and_has_time_to_finish():
    (application,) = served()["applications"]
    settings = load_settings(application["args"], {})
    (group,) = cluster_of(read(SERVICE))["workerGroupSpecs"]
    resources = autoscaling(SERVICE)["available_node_types"]["gpu"]["resources"]
    assert (settings.num_cpus, settings.num_gpus) == (resources["CPU"], resources["GPU"])
    assert (settings.min_replicas, settings.max_replicas) == (group["minReplicas"], group["maxReplicas"])
    assert settings.drain < group["template"]["spec"]["terminationGracePeriodSeconds"]
    ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
    assert served()["http_options"] == {"host": "0.0.0.0", "port": ports["serve"]}


@pytest.mark.parametrize("name", OPERATED)
def test_the_operator_gets_the_ray_version_of_the_image(name: str):
    assert cluster_of(read(name))["rayVersion"] == ray.__version__


# Settings and secrets


@functools.cache
def is_read(name: str) -> bool:
    """Whether our code, Ray or MLflow reads this environment variable."""
    if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() in FIELDS:
        return True
    if name.startswith("MLFLOW_"):
        from mlflow import environment_variables

        return getattr(environment_variables, name, None) is not None
    return any(re.search(rf"\b{name}\b", text) for text in sources())


@functools.cache
def sources() -> tuple[str, ...]:
    """The text of our code and of the part of Ray that runs nodes, jobs and services."""
    ours = [ROOT / "gptcore" / "home.py", *(ROOT / "train_job").glob("*.py")]
    rays = [path for part in ("_private", "dashboard", "serve") for path in (RAY / part).rglob("*.py")]
    return tuple(path.read_text() for path in [*ours, *rays])


RAY = Path(ray.__file__).parent


@pytest.mark.parametrize("name", [*LAUNCHED, *OPERATED])
def test_each_variable_set_in_a_file_is_read_by_the_code(name: str):
    assert environment(name)
    assert [variable for variable in environment(name) if not is_read(variable)] == []


def test_a_misspelt_variable_is_found():
    assert not is_read("RAY_SERVE_ENABLE_HAPROXY")
    assert not is_read("MLFLOW_TRACKING_URL")
    assert not is_read("GPT_API_KEY")


@pytest.mark.parametrize("name", [*LAUNCHED, *OPERATED])
def test_every_node_has_the_home_requires_the_token_and_unpickles_nothing(name: str):
    env = environment(name)
    assert env["GPT_FOUNDRY_HOME"] == "/mnt/gpt-foundry"
    assert env["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert env["MLFLOW_TRACKING_URI"].startswith("http://")
    if name in LAUNCHED:
        assert env["RAY_AUTH_MODE"] == "token"
        assert read(name)["file_mounts"] == {env["RAY_AUTH_TOKEN_PATH"]: "~/.ray/auth_token"}
    else:
        assert cluster_of(read(name))["authOptions"] == {"mode": "token", "secretName": "gpt-foundry-ray-token"}


@pytest.mark.parametrize("name", [*LAUNCHED, SERVICE])
def test_haproxy_is_in_front_of_the_replicas(name: str):
    assert environment(name)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


@pytest.mark.parametrize("name", [*LAUNCHED, JOB])
def test_a_stopped_job_has_time_to_save_a_checkpoint(name: str):
    assert int(environment(name)["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


SECRETS = {
    "a key or token": r"\b(?=\w*\d)(?=\w*[A-Za-z])[A-Za-z0-9+_]{24,}\b",
    "an AWS key": r"\bAKIA[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN",
    "a password in an address": r"://[^/\s:]+:[^/\s@]+@",
    "a password by its name": r"(?i)(password|passwd|secret|token|api_?keys?)(=|: *|, value: *)[\"']?(?!false)\w{4,}",
}


def secrets_in(text: str) -> list[str]:
    """The kinds of secret in a file, not counting comments."""
    text = re.sub(r"(?<!\S)#.*", "", text)
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_in_a_file(name: str):
    assert secrets_in((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "- -e RAY_AUTH_TOKEN=5f2d8c0e9b7a41d3a6c5e4f3",
        "- -e AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE",
        "- -e MLFLOW_TRACKING_URI=http://me:hunter2@mlflow:5000",
        "- { name: MLFLOW_TRACKING_PASSWORD, value: hunter2 }",
        "api_keys: letmein",
        "ssh_private_key: |\n  -----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_a_secret_would_be_found(line: str):
    assert secrets_in(line)
