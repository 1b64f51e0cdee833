"""Which front a Ray that we start gets."""

import importlib.util
import re
import stat
from pathlib import Path

import pytest

from serve_app.front import haproxy


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes HAProxy appear to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_haproxy_is_the_default_with_its_own_files_and_ports():
    one: dict[str, str] = {}
    other: dict[str, str] = {}
    haproxy.use_haproxy(one)
    haproxy.use_haproxy(other)
    assert one[haproxy.SWITCH] == other[haproxy.SWITCH] == "1"
    differ = {name for name in one if one[name] != other[name]}
    own = {name for name in one if name.endswith(("_PORT", "_PATH", "_FILE", "_LOC", "_BASE"))} - {haproxy.BINARY}
    assert own - {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"} == differ
    folder = Path(one["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_sockets_have_short_paths_wherever_temporary_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    socket = Path(haproxy.local_environment()["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"])
    node = "f" * 56  # Ray puts them into a folder of the node
    assert len(str(socket.parent / node / socket.name)) <= 97


@pytest.mark.parametrize("said", ["0", ""])
def test_a_user_can_choose_rays_own_proxy(said: str):
    environment = {haproxy.SWITCH: said}
    haproxy.use_haproxy(environment)
    assert environment == {haproxy.SWITCH: said} | haproxy.FRONT


def test_a_users_settings_are_kept():
    environment = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    haproxy.use_haproxy(environment)
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"


def test_without_haproxy_rays_own_proxy_gets_our_middleware(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    environment: dict[str, str] = {}
    haproxy.use_haproxy(environment)
    assert environment == haproxy.FRONT


def test_haproxy_gets_the_time_limit_for_bodies():
    environment: dict[str, str] = {}
    haproxy.use_haproxy(environment, body_seconds=2.5)
    assert environment[haproxy.BODY_TIMEOUT] == "2.5"
    text = "frontend http_frontend\n    bind *:1\n"
    assert "timeout http-request 2500ms" in haproxy.amend_config(text, Path("s"), Path("u"), environment)


def test_the_image_sets_the_variables_that_nodes_with_haproxy_need():
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text()
    set_there = dict(re.findall(r"(RAY_(?:SERVE|worker)_\w+)=([^\s\\]+)", dockerfile))
    wanted = haproxy.node_environment() | {haproxy.BINARY: f"/opt/venv/bin/{haproxy.SUPERVISOR}"}
    assert set_there == {name: value for name, value in wanted.items() if name != haproxy.SWITCH}


def test_a_reserved_port_is_not_one_that_the_system_hands_out():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert haproxy.PORTS.stop <= min(lowest, 30_000)  # from 30000 on, Ray's replicas choose
    assert haproxy.free_port() in haproxy.PORTS
