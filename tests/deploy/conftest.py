"""Starts what `mlflow/compose.yaml` starts, without containers: PostgreSQL, an S3 server and the tracking server.

The server's command and environment are those of the file; its addresses are replaced, nothing else. It runs in an
empty folder, as in its container.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ports import free_port
from tests.system.conftest import BIN, ROOT
from tests.waiting import await_server

COMPOSE = ROOT / "mlflow" / "compose.yaml"
ENV_EXAMPLE = ROOT / "mlflow" / ".env.example"
START_SECONDS = 300.0


def interpolated(value: Any, env: dict[str, str]) -> Any:
    """Fills in `${NAME:?why}` and `${NAME:-default}` in a part of a compose file, as Compose does."""
    if isinstance(value, dict):
        return {key: interpolated(inner, env) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner, env) for inner in value]

    def fill(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        if not env.get(name) and kind == ":?":
            raise KeyError(f"{name}: {text}")
        return env.get(name) or text

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", fill, value) if isinstance(value, str) else value


def services(env: dict[str, str]) -> dict[str, Any]:
    """The services of `mlflow/compose.yaml` with this .env."""
    found: dict[str, Any] = interpolated(yaml.safe_load(COMPOSE.read_text()), env)["services"]
    return found


def named_secrets() -> list[str]:
    """The names in .env.example that have no value."""
    return re.findall(r"^(\w+)=$", ENV_EXAMPLE.read_text(), re.MULTILINE)


@pytest.fixture(scope="session")
def dotenv() -> dict[str, str]:
    """A .env with a secret for each name."""
    return {name: secrets.token_hex(24) for name in named_secrets()}


def start(folder: Path, *command: str | Path, **more: Any) -> subprocess.Popen[bytes]:
    """Starts a server in `folder`, with its output in a file there."""
    with open(log_of(folder), "ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, **more)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def await_start(server: subprocess.Popen[bytes], check: list[str], folder: Path) -> None:
    """Waits until the health check succeeds. Fails with the server's log if the server ends first or takes too long."""
    await_server(
        server, lambda: subprocess.run(check, capture_output=True).returncode == 0, log_of(folder), START_SECONDS
    )


def postgres_programs() -> Path:
    """The folder with initdb and postgres. Skips the test if there is none."""
    on_path = shutil.which("initdb")
    found = [Path(on_path)] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package is called postgresql)")
    return found[-1].resolve().parent


@pytest.fixture(scope="session")
def postgres(dotenv: dict[str, str]) -> Iterator[int]:
    """Starts PostgreSQL with the user, password and database of compose.yaml. Yields its port."""
    programs, service, port = postgres_programs(), services(dotenv)["postgres"], str(free_port())
    env, check = service["environment"], service["healthcheck"]["test"][1:]
    above = Path(tempfile.mkdtemp(prefix="postgres-"))  # not pytest's, which only we may enter
    folder, password, account = above / "data", above / "password", {}
    if os.geteuid() == 0:  # as whom it refuses to run
        account = {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(above, "postgres", "postgres")
    password.write_text(env["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    folder.mkdir()
    if account:
        shutil.chown(folder, "postgres", "postgres")
    options = ["--auth=scram-sha-256", f"--pwfile={password}", f"--username={env['POSTGRES_USER']}", "--no-sync"]
    subprocess.run([programs / "initdb", *options, folder], cwd=above, check=True, capture_output=True, **account)
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
    server = start(folder, programs / "postgres", "-D", folder, "-p", port, *settings, **account)
    try:
        await_start(server, [str(programs / check[0]), *check[1:], "-p", port], folder)
        where = ["--host=127.0.0.1", f"--port={port}", f"--username={env['POSTGRES_USER']}"]
        secret = {"PGPASSWORD": env["POSTGRES_PASSWORD"]}
        subprocess.run([programs / "createdb", *where, env["POSTGRES_DB"]], env=secret, cwd=above, check=True)
        yield int(port)
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown; on SIGTERM it waits for its clients
        server.wait(30)
        shutil.rmtree(above)


@dataclass(frozen=True)
class Store:
    """An S3 server, and the environment variables of its clients."""

    url: str
    env: dict[str, str]

    def filesystem(self) -> Any:
        """An s3fs file system on the server."""
        import s3fs

        key, secret = self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"]
        return s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=self.url, skip_instance_cache=True)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Denies all access to the store within the block."""

        def ask_who_it_is(after: str) -> None:
            body, kind = after.encode(), {"Content-Type": "text/plain"}  # requests that need no rights
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", body, kind)).close()

        ask_who_it_is(after="0")
        try:
            yield
        finally:
            ask_who_it_is(after="inf")

    def files(self, folder: str) -> list[str]:
        """Every file below `BUCKET/FOLDER`, as paths from there."""
        fs = self.filesystem()
        fs.invalidate_cache()
        return sorted(name.removeprefix(folder + "/") for name in fs.find(folder))


@contextlib.contextmanager
def s3_server(bucket: str, keys: dict[str, str]) -> Iterator[Store]:
    """moto's S3 server with one bucket, for clients that have these keys."""
    import moto.server

    server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request, of which none matters
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    store = Store(url, keys | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url})
    store.filesystem().mkdir(bucket)
    try:
        yield store
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3(dotenv: dict[str, str]) -> Iterator[Store]:
    """moto's S3 server with the bucket of compose.yaml."""
    pytest.importorskip("moto.server", reason="moto[server], the S3 server of these tests, is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed (the extra s3)")
    env = services(dotenv)["s3"]["environment"]
    keys = {name: env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    with s3_server(env["S3_BUCKET"], keys) as store:
        yield store


@pytest.fixture
def bucket(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of a folder that only this test uses. Sets the environment of a client of the store."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GPT_FOUNDRY_HOME", str(tmp_path / "home"))
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # another test's store may be gone
    yield f"s3://mlflow/{tmp_path.name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def no_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of Google Cloud Storage is not installed."""
    from fsspec.registry import _registry  # a client that was used is remembered there

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)


@pytest.fixture(scope="session")
def gcs() -> Iterator[dict[str, str]]:
    """Starts an emulated Google Cloud Storage with a bucket `foundry`. Yields the environment of its clients."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    port = free_port()
    # gcsfs asks by gRPC what kind of bucket it is, which the emulator does not speak, and tries for a minute. Whether
    # it does that is decided when it is imported.
    env = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    env["NO_GCE_CHECK"] = "true"  # this is not a Google machine, and the check would wait for seconds
    with pytest.MonkeyPatch.context() as patched:
        for name, value in env.items():
            patched.setenv(name, value)
        pytest.importorskip("gcsfs", reason="gcsfs is not installed (the extra gcs)")
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="foundry")
        server.start()
        yield env
        server.stop()


@dataclass(frozen=True)
class Team:
    """The tracking server, and the credentials of its administrator."""

    uri: str
    env: dict[str, str]
    dotenv: dict[str, str] = field(repr=False)
    folder: Path
    """The folder that the server runs in."""

    def client(self, **env: str) -> dict[str, str]:
        """A client's environment variables."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.env["MLFLOW_AUTH_ADMIN_USERNAME"],
            "MLFLOW_TRACKING_PASSWORD": self.env["MLFLOW_AUTH_ADMIN_PASSWORD"],
        } | env

    def status(self, path: str, **headers: str) -> int:
        """The status of a GET of `path`."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.uri + path, headers=headers), timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="session")
def team(dotenv: dict[str, str], postgres: int, s3: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Starts the mlflow service of compose.yaml."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed: the server cannot ask for passwords")
    pytest.importorskip("psycopg", reason="psycopg is not installed: the server cannot reach PostgreSQL")
    port = str(free_port())
    dotenv = dotenv | {"MLFLOW_ALLOWED_HOSTS": f"127.0.0.1:{port}"}
    service = services(dotenv)["mlflow"]
    here = {"--host": "127.0.0.1", "--port": port}
    command = [
        f"{flag}={here[flag]}" if flag in here else word
        for word in service["command"]
        for flag in [word.partition("=")[0]]
    ]
    mounted = dict(volume.split(":")[1::-1] for volume in service["volumes"])  # by path in the container
    env = dict(service["environment"]) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"PGHOST": "127.0.0.1", "PGPORT": str(postgres), "MLFLOW_S3_ENDPOINT_URL": s3.url}
    env["MLFLOW_AUTH_CONFIG_PATH"] = str(COMPOSE.parent / mounted[env["MLFLOW_AUTH_CONFIG_PATH"]])
    check = [word.replace(":5000/", f":{port}/") for word in service["healthcheck"]["test"][1:]]
    folder = tmp_path_factory.mktemp("container") / "tmp"
    folder.mkdir()
    server = start(folder, *command, env=env | {"HOME": str(folder)})
    try:
        await_start(server, [sys.executable, *check[1:]], folder)
        yield Team(f"http://127.0.0.1:{port}", env, dotenv, folder)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        with contextlib.suppress(ProcessLookupError):  # its workers
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
