"""OpenAI's GPT-2 and the registry's champion in one service, as in this project's predecessors."""

from pathlib import Path

import httpx2
import pytest

from serve_app.settings import load_settings
from tests.hugging_face import COMMIT, Layout, publish_gpt2, put_into_cache
from tests.serve_app.conftest import TestRegistry
from tests.serve_app.running import running

QUICK = dict(poll_seconds=3600.0, slots=2, threads=1, backend="torch", dtype="float32")
PROMPT = {"prompt": "The future of AI is", "max_new_tokens": 12, "seed": 7}


def test_the_champion_and_gpt2_from_the_hubs_cache_answer_side_by_side(
    registry: TestRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.publish("beside")
    snapshot = put_into_cache(tmp_path / "hub", "openai-community/gpt2", publish_gpt2(tmp_path / "gpt2"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(snapshot.parents[2]))
    named = {"GPT_MODELS": "custom=models:/beside@champion,gpt2=hf:openai-community/gpt2"}
    with running(load_settings(QUICK | dict(tracking_uri=registry.uri), environ=named)) as service:
        replies = {name: httpx2.post(f"{service.url}/generate/{name}", json=PROMPT) for name in ("custom", "gpt2")}
        listed = {entry["name"]: entry for entry in httpx2.get(f"{service.url}/models").json()["models"]}
    assert [reply.status_code for reply in replies.values()] == [200, 200]
    assert replies["custom"].headers["x-model-version"] == f"custom/{version}"
    assert replies["gpt2"].headers["x-model-version"] == f"gpt2/{COMMIT[:12]}"
    assert all(reply.json()["generated_text"].startswith(PROMPT["prompt"]) for reply in replies.values())
    assert listed["gpt2"]["source"] == "hf:openai-community/gpt2"


def test_a_missing_gpt2_says_what_to_download_and_the_champion_answers(
    registry: TestRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish("alone")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    named = {"GPT_MODELS": "custom=models:/alone@champion,gpt2=hf:gpt2"}
    with running(load_settings(QUICK | dict(tracking_uri=registry.uri), environ=named)) as service:
        missing = httpx2.post(f"{service.url}/generate/gpt2", json=PROMPT)
        assert httpx2.post(f"{service.url}/generate/custom", json=PROMPT).status_code == 200
    assert missing.status_code == 503
    assert "hf download openai-community/gpt2" in missing.json()["error"]["message"]


def test_the_version_of_weights_in_several_files_depends_on_each_file(tmp_path: Path) -> None:
    versions = []
    for seed in (0, 0, 1):
        folder = publish_gpt2(tmp_path / str(len(versions)), Layout(files=2), seed=seed)
        with running(load_settings(QUICK | dict(model=str(folder)), environ={})) as service:
            versions.append(httpx2.post(f"{service.url}/generate", json=PROMPT).headers["x-model-version"])
    assert versions[0].partition("/")[2] == versions[1].partition("/")[2] != versions[2].partition("/")[2]
