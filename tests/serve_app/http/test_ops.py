"""The routes for probes, scrapers and operators, with a healthy service and with an unhealthy one."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptcore.errors import EngineError
from gptcore.package import Package
from serve_app.errors import without_folders
from serve_app.http.app import create_api
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings
from tests.serve_app.running import Running, running
from tests.waiting import eventually

BODY: dict[str, Any] = dict(prompt="The future of AI is", max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def service(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A loaded model, one that is not loaded yet, and one that cannot be loaded."""
    broken = tmp_path_factory.mktemp("broken")
    models = (f"tiny={package.path}", f"later={package.path}/../{package.path.name}", f"broken={broken}")
    with running(ServeSettings(models=models, dtype="float32", slots=4)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


def figures(client: httpx2.Client, **labels: str) -> dict[str, float]:
    """The sums of the samples with these labels, by name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_a_service_whose_model_is_warm_is_alive_and_ready(client: httpx2.Client) -> None:
    health, ready = client.get("/health"), client.get("/ready")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    version = client.get("/models").json()["models"][0]["version"]
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "model": "tiny", "version": version})


@pytest.mark.anyio
async def test_before_its_model_is_loaded_a_replica_is_alive_and_not_ready(package: Package) -> None:
    settings = ServeSettings(models=(f"tiny={package.path}",))
    transport = httpx2.ASGITransport(create_api(settings, Models(settings)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/health")).status_code == 200
        reply = await client.get("/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_ready")
        assert reply.headers["retry-after"] == "1"
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.anyio
async def test_a_replica_whose_model_cannot_be_loaded_stays_alive_and_tells_operators_why(tmp_path: Path) -> None:
    settings = ServeSettings(models=(f"tiny={tmp_path}",))
    models = Models(settings)
    await models.start()
    transport = httpx2.ASGITransport(create_api(settings, models))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/health")).status_code == 200
        error = (await client.get("/ready")).json()["error"]
        entry = (await client.get("/models")).json()["models"][0]
    await models.close()
    assert entry["state"] == "failed"
    assert entry["error"]
    assert "failed" in error["message"]
    assert str(tmp_path) not in error["message"]  # asked without a key


def test_a_replica_whose_engine_died_is_not_healthy(
    client: httpx2.Client, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.engine, "_error", EngineError("killed by the test"))
    for path in ("/health", "/ready"):
        reply = client.get(path)
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "server_error"
        assert int(reply.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert client.get("/health").status_code == 200


def test_models_lists_every_model_with_its_origin(client: httpx2.Client, package: Package) -> None:
    tiny, later, broken = client.get("/models").json()["models"]
    assert [entry["name"] for entry in (tiny, later, broken)] == ["tiny", "later", "broken"]
    assert (tiny["state"], tiny["default"]) == ("ready", True)
    assert tiny["bits_per_byte"] == package.info["training"]["bits_per_byte"]
    assert tiny["data_fingerprint"] == package.info["training"]["data_fingerprint"]
    assert tiny["run_id"] == package.info["training"]["run_id"]
    assert tiny["context_length"] == package.config.context_length
    assert tiny["parameters"] > 0
    age = datetime.now(UTC) - datetime.fromisoformat(tiny["loaded_at"])
    assert 0 <= age.total_seconds() < 600
    assert (later["state"], later["version"]) == ("unloaded", None)
    assert broken["state"] in ("unloaded", "failed")


def test_a_model_that_cannot_be_loaded_is_reported_and_the_others_answer(client: httpx2.Client) -> None:
    reply = client.post("/generate", json={**BODY, "model": "broken"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_ready")
    assert int(reply.headers["retry-after"]) >= 1
    broken = client.get("/models").json()["models"][2]
    assert broken["state"] == "failed"
    assert broken["error"] in reply.json()["error"]["message"]
    assert client.post("/generate", json=BODY).status_code == 200
    assert client.get("/health").status_code == 200


def test_no_reply_names_a_folder_of_this_machine(client: httpx2.Client, package: Package) -> None:
    refused = client.post("/generate", json={**BODY, "model": "broken"})
    assert refused.status_code == 503
    replies = [refused, *(client.get(path) for path in ("/models", "/v1/models", "/ready", "/metrics"))]
    assert not [reply.text for reply in replies if str(package.path.parent) in reply.text]
    assert client.get("/models").json()["models"][0]["source"] == f"…/{package.path.name}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/package: foundry.json is missing", "…/package: foundry.json is missing"),
        ("no database at sqlite:////home/me/mlflow.db; train", "no database at sqlite:///…/mlflow.db; train"),
        ("'/data/a/b.bin' and file:///data/a/c", "'…/b.bin' and file://…/c"),
        ("models:/gpt@champion", "models:/gpt@champion"),
        ("hf:openai-community/gpt2", "hf:openai-community/gpt2"),
        ("https://hub.example/a/b s3://bucket/a/b", "https://hub.example/a/b s3://bucket/a/b"),
        ("GET /models says more; runs/demo/package", "GET /models says more; runs/demo/package"),
    ],
)
def test_only_the_last_part_of_a_path_is_shown(text: str, shown: str) -> None:
    assert without_folders(text) == shown


@pytest.mark.parametrize("stream", [False, True])
def test_the_metrics_agree_with_the_answers(client: httpx2.Client, service: Running, stream: bool) -> None:
    version = client.get("/models").json()["models"][0]["version"]
    labels = dict(model="tiny", version=version)
    before, count = figures(client, **labels), 3
    for _ in range(count):
        reply = client.post("/generate", json={**BODY, "stream": stream})
        assert reply.status_code == 200
    eventually(lambda: service.leases == 0, "the requests have ended")
    after = figures(client, **labels)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if name.startswith("gpt_")}
    prompt = len(service.engine.package.tokenizer.encode(BODY["prompt"]))
    tokens = BODY["max_new_tokens"]
    assert grown["gpt_requests_total"] == count
    assert grown["gpt_request_success_total"] == count
    assert grown["gpt_prompt_tokens_total"] == count * prompt
    assert grown["gpt_generation_tokens_total"] == count * tokens
    assert grown["gpt_time_to_first_token_seconds_count"] == count
    assert grown["gpt_request_queue_time_seconds_count"] == count
    assert grown["gpt_e2e_request_latency_seconds_count"] == count
    assert 0 < grown["gpt_time_to_first_token_seconds_sum"] <= grown["gpt_e2e_request_latency_seconds_sum"]
    assert 0 <= grown["gpt_inter_token_latency_seconds_count"] <= count * (tokens - 1)
    assert (after["gpt_slots"], after["gpt_slots_used"], after["gpt_num_requests_running"]) == (4, 0, 0)
    assert after["gpt_model_loaded"] == 1


def test_requests_are_counted_by_route_template_and_not_by_path(client: httpx2.Client) -> None:
    for path in ("/no-such-route-1", "/no-such-route-2", "/generate/no-such-model"):
        assert client.post(path, json={"prompt": "x"}).status_code == 404
    text = client.get("/metrics").text
    assert "no-such" not in text
    assert re.search(r'gpt_requests_total{.*route="unmatched",status="404".*} [2-9]', text)
    assert 'route="/generate/{model}",status="404"' in text


def test_metrics_are_in_prometheus_text_format(client: httpx2.Client) -> None:
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
