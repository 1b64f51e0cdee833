"""Text to token ids and back over HTTP, compared with `transformers` on the same package."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer

from gptcore.package import Package
from serve_app.settings import ServeSettings
from tests.serve_app.running import running

TEXTS = ["The future of AI is", "", "Füße – 東京 🎉", "a\n\n  b", "<|endoftext|>", "x" * 5000]


@pytest.fixture(scope="module")
def client(package: Package) -> Iterator[httpx2.Client]:
    settings = ServeSettings(models=(f"tiny={package.path}",), dtype="float32", api_keys=("key",))
    with (
        running(settings) as service,
        httpx2.Client(base_url=service.url, timeout=60, headers={"authorization": "Bearer key"}) as client,
    ):
        yield client


def post(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-model-version"].startswith("tiny/")
    return reply.json()


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_tokens_and_their_text_match_transformers(client: httpx2.Client, package: Package, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(package.path)
    said = post(client, "/tokenize", model="tiny", prompt=text, return_token_strs=True)
    assert said["tokens"] == theirs(text, add_special_tokens=False).input_ids
    assert said["token_strs"] == theirs.convert_ids_to_tokens(said["tokens"])
    assert (said["count"], said["max_model_len"]) == (len(said["tokens"]), 128)
    assert post(client, "/detokenize", model="tiny", tokens=said["tokens"]) == {"prompt": text}


def test_the_ids_are_the_ones_that_a_completion_uses(client: httpx2.Client) -> None:
    text = "one <|endoftext|> two"
    said = post(client, "/tokenize", prompt=text, add_special_tokens=False)
    assert said["token_strs"] is None
    used = post(client, "/v1/completions", model="tiny", prompt=text, max_tokens=1)["usage"]["prompt_tokens"]
    assert said["count"] == used


def test_half_characters_become_replacement_characters(client: httpx2.Client) -> None:
    assert post(client, "/detokenize", tokens=[0xE6, 0x9D]) == {"prompt": "\ufffd"}
    assert post(client, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "model": "tinny"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1, 257]}, "tokens"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(
    client: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == (404 if param == "model" else 400)
    error = reply.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


def test_the_tokenizer_is_described_as_clients_expect(client: httpx2.Client, package: Package) -> None:
    theirs = AutoTokenizer.from_pretrained(package.path)
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (theirs.bos_token, theirs.eos_token)
    assert (info["model_max_length"], info["chat_template"]) == (128, None)


def test_a_key_is_required_as_on_other_routes(client: httpx2.Client) -> None:
    bad = {"authorization": "Bearer wrong"}
    for path in ("/tokenize", "/detokenize"):
        assert client.post(path, json={}, headers=bad).status_code == 401
    assert client.get("/tokenizer_info", headers=bad).status_code == 401
