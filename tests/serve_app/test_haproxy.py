"""Claims about which front a Ray of our own gets."""

import importlib.util
import stat
from pathlib import Path

import pytest

from serve_app import haproxy


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy is there, whatever the machine."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_haproxy_is_preferred_with_files_and_ports_of_its_own():
    one: dict[str, str] = {}
    other: dict[str, str] = {}
    haproxy.prefer(one)
    haproxy.prefer(other)
    assert one[haproxy.SWITCH] == other[haproxy.SWITCH] == "1"
    differ = {name for name in one if one[name] != other[name]}
    assert {name for name in one if name.endswith(("_PORT", "_PATH", "_FILE", "_LOC", "_BASE"))} == differ
    folder = Path(one["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("said", ["0", ""])
def test_a_user_who_says_no_gets_rays_own_proxy(said: str):
    environment = {haproxy.SWITCH: said}
    haproxy.prefer(environment)
    assert environment == {haproxy.SWITCH: said}


def test_a_users_settings_stay():
    environment = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    haproxy.prefer(environment)
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"


def test_without_haproxy_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    environment: dict[str, str] = {}
    haproxy.prefer(environment)
    assert environment == {}
