"""Open WebUI's requests, as the routers of its backend (openai.py and tasks.py) and its utils/payload.py build them.

Open WebUI itself is too large to install for a test. It is given the address `…/v1` and a key.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gptcore.chat import CHATML
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.running import running

HEADERS = {
    "Content-Type": "application/json",
    "Authorization": "Bearer secret",
    "X-OpenWebUI-User-Name": "Ada",
    "X-OpenWebUI-User-Id": "9b2d",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "The cat?"},
    {"role": "assistant", "content": "It sleeps."},
    {"role": "user", "content": "And?"},
]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """What Open WebUI sends its requests with, to a service that asks for a key."""
    root = tmp_path_factory.mktemp("webui")
    folder: Path = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "model", 512, "llama", context=128)
    (folder / "chat_template.jinja").write_text(CHATML)
    with running(ServeSettings(models=(f"talker={folder}",), dtype="float32", api_keys=("secret",))) as service:
        yield httpx2.Client(base_url=f"{service.url}/v1", headers=HEADERS)


def test_its_list_of_models(connection: httpx2.Client) -> None:
    reply = connection.get("models").json()
    assert [model["id"] for model in reply["data"]] == ["talker"]
    assert "error" not in reply


def test_a_message_in_a_chat(connection: httpx2.Client) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 10, "frequency_penalty": 0.1, "seed": 7}
    body = {"model": "talker", "messages": TALK, "stream": True, "stop": ["\n\n"], **params}
    body["stream_options"] = {"include_usage": True}
    with connection.stream("POST", "chat/completions", json=body) as reply:
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    whole = connection.post("chat/completions", json={**body, "stream": False, "stream_options": None}).json()
    said = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert said == whole["choices"][0]["message"]["content"]
    assert events[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_the_title_of_a_chat(connection: httpx2.Client) -> None:
    messages = [{"role": "user", "content": "Write a title for this chat: The cat? It sleeps."}]
    body = {"model": "talker", "messages": messages, "stream": False, "max_completion_tokens": 1000}
    reply = connection.post("chat/completions", json=body)
    assert reply.status_code == 200
    assert isinstance(reply.json()["choices"][0]["message"]["content"], str)


def test_an_error_is_json_that_it_shows(connection: httpx2.Client) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    for change in ({"messages": [{"role": "user", "content": image}]}, {"model": "gone"}):
        reply = connection.post("chat/completions", json={"model": "talker", "messages": TALK, "stream": True} | change)
        assert reply.status_code in (400, 404)
        assert reply.json()["error"]["message"]
