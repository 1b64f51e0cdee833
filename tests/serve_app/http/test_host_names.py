"""Which host names a service answers to, so that no web page can reach it by pointing its own name at this machine."""

import httpx2
import pytest

from gptcore.package import Package
from serve_app.http.app import create_api
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings

pytestmark = pytest.mark.anyio

OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.7"]
FOREIGN += ["0.0.0.0", "[::2]:80", "evil.example:127.0.0.1"]


async def ask(package: Package, name: str, path: str = "/health", **settings: object) -> httpx2.Response:
    """The reply of a service with these settings to a request for the host `name`."""
    given = ServeSettings(models=(f"tiny={package.path}",), **settings)  # type: ignore[arg-type]
    transport = httpx2.ASGITransport(create_api(given, Models(given)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path, headers={"host": name})


@pytest.mark.parametrize("host", [*OWN, ""])
async def test_on_loopback_the_names_of_loopback_are_answered(package: Package, host: str):
    assert (await ask(package, host)).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/health", "/models", "/nowhere", "/"])
async def test_on_loopback_any_other_name_is_refused_on_every_route(package: Package, host: str, path: str):
    reply = await ask(package, host, path)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (403, "host_not_allowed", "invalid_request_error")
    assert "GPT_ALLOWED_HOSTS" in error["message"]


async def test_a_name_that_is_allowed_is_answered(package: Package):
    allowed = {"allowed_hosts": ("gpt.example", "Other.Example")}
    for host in ("gpt.example", "GPT.example:443", "other.example", "localhost"):
        assert (await ask(package, host, **allowed)).status_code == 200
    assert (await ask(package, "evil.example", **allowed)).status_code == 403
    assert (await ask(package, "evil.example", allowed_hosts=("*",))).status_code == 200


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"host": "10.0.0.7"}, {"api_keys": ("k",)}])
async def test_with_other_addresses_or_with_keys_any_host_name_is_answered(
    package: Package, settings: dict[str, object]
):
    assert (await ask(package, "10.1.2.3:8000", **settings)).status_code == 200


async def test_allowed_host_names_apply_wherever_the_service_listens(package: Package):
    reply = await ask(package, "evil.example", host="0.0.0.0", allowed_hosts=("gpt.example",))
    assert reply.status_code == 403
