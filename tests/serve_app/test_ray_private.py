"""Claims about Ray's private parts that the service uses: an upgrade of Ray that changes one fails here."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import serve
from ray._private import ray_logging
from ray.serve._private import api, client
from ray.serve._private.client import ServeControllerClient
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from serve_app import ray_private
from serve_app.deployment import MISLEADING, START_SECONDS, Service
from serve_app.front import haproxy

HERE = f"Ray {ray.__version__} differs from the version that serve_app/ray_private.py was tried with:"
PARTS = [ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator]


def test_the_dashboard_of_a_ray_that_was_started_here_comes_when_it_is_asked_for():
    code = """
import psutil, ray
from serve_app.ray_private import dashboard_later
seen = []
with dashboard_later() as left:
    ray.init(address="local", num_cpus=1, log_to_driver=False, dashboard_port=0)
for step in (lambda: None, *left):
    step()
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    said = [process.info for process in psutil.process_iter(["pid", "cmdline"])]  # None once it has ended
    seen.append(any("dashboard.py" in " ".join(one["cmdline"] or ()) for one in said if one["pid"] in ours))
print(seen)
"""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[0] == "[False, True]", f"{HERE} {done.stdout} {done.stderr[-2000:]}"


def test_ray_reads_the_patience_with_proxies_where_it_is_set(monkeypatch: pytest.MonkeyPatch):
    for module in (api, client):
        before = vars(module).get("HTTP_PROXY_TIMEOUT")
        assert before, f"{HERE} {module.__name__} has no HTTP_PROXY_TIMEOUT"
        assert "timeout=HTTP_PROXY_TIMEOUT" in inspect.getsource(module), f"{HERE} {module.__name__} does not read it"
        monkeypatch.setattr(module, "HTTP_PROXY_TIMEOUT", before)  # undone after the test
    ray_private.wait_for_proxies(START_SECONDS)
    assert vars(api)["HTTP_PROXY_TIMEOUT"] == vars(client)["HTTP_PROXY_TIMEOUT"] == START_SECONDS


def test_ray_knows_the_host_that_serve_listens_on(monkeypatch: pytest.MonkeyPatch):
    assert callable(_get_global_client)
    assert isinstance(getattr(ServeControllerClient, "http_config", None), property), f"{HERE} no client.http_config"
    stand_in = object.__new__(ServeControllerClient)
    stand_in._http_config = HTTPOptions(host="192.0.2.7")
    monkeypatch.setattr(ray_private, "_get_global_client", lambda: stand_in)
    assert ray_private.listening_host() == "192.0.2.7", f"{HERE} client.http_config has another host"


def test_ray_hides_the_lines_that_mislead(monkeypatch: pytest.MonkeyPatch):
    lines = ["Task ServeController.graceful_shutdown failed", "it won't accept connections from HAProxy on other nodes"]
    for part in PARTS:
        assert hasattr(part, "skip_re"), f"{HERE} {type(part).__name__} has no skip_re"
        monkeypatch.setattr(part, "skip_re", None)
    ray_private.hide_lines(MISLEADING)
    for part in PARTS:
        batches = part.deduplicate({"ip": "", "pid": 0, "lines": [*lines, "a line to read"]})
        assert [line for batch in batches for line in batch["lines"]] == ["a line to read"], f"{HERE} lines are shown"


def test_a_pattern_of_the_users_stays(monkeypatch: pytest.MonkeyPatch):
    users = re.compile("noise")
    for part in PARTS:
        monkeypatch.setattr(part, "skip_re", users)
    ray_private.hide_lines(MISLEADING)
    assert [part.skip_re for part in PARTS] == [users, users]


def test_ray_documents_the_method_that_makes_a_replicas_app():
    name = Service.__serve_build_asgi_app__.__name__
    assert name in (serve.ingress.__doc__ or ""), f"{HERE} serve.ingress does not document {name}"
    assert serve.ingress()(Service), f"{HERE} serve.ingress refuses the service"


@pytest.mark.skipif(sys.platform != "linux", reason="Ray has HAProxy on Linux alone")
def test_ray_reads_each_variable_of_the_front():
    names = {*haproxy.FRONT, *haproxy.HAPROXY, *haproxy.local_environment(), haproxy.BINARY}
    folder = Path(ray.__file__).parent
    text = "\n".join(path.read_text() for part in ("_private", "serve") for path in (folder / part).rglob("*.py"))
    unread = sorted(name for name in names | {*haproxy.STATISTICS.values()} if not re.search(rf"\b{name}\b", text))
    assert unread == [], f"{HERE} it does not read these"


def test_only_one_module_uses_private_parts_of_another_package():
    """A module or attribute of another package that begins with an underscore, or is below one that does."""
    private = re.compile(r"^\s*(?:from|import) (?!__future__)\S*\b_\w|^\s*from .* import .*\b_\w", re.MULTILINE)
    root = Path(ray_private.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if private.search(path.read_text())}
    assert found == {"ray_private.py"}
