"""Open models' own tokenizers over HTTP: what is put before a prompt, and where its tokens begin in the text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import PreTrainedTokenizerFast

from gptcore.errors import TokenizerError
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.running import running

TEXT = "The cat sat on the Tisch <|eot_id|> 🙂"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"llama3": 1024, "llama2": 704}
    return {
        kind: publish(write_tokenizer(kind, root / "tokenizers" / kind), root / kind, sizes[kind]) for kind in sizes
    }


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[httpx2.Client]:
    models = tuple(f"{kind}={folder}" for kind, folder in folders.items())
    with (
        running(ServeSettings(models=models, dtype="float32", slots=2)) as service,
        httpx2.Client(base_url=service.url, timeout=60) as client,
    ):
        yield client


def post(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_tokens_are_those_of_transformers_with_and_without_bos(
    client: httpx2.Client, folders: dict[str, Path], kind: str
) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folders[kind], split_special_tokens=True)
    for special in (True, False):
        said = post(client, "/tokenize", model=kind, prompt=TEXT, add_special_tokens=special, return_token_strs=True)
        assert said["tokens"] == theirs(TEXT, add_special_tokens=special).input_ids
        assert said["token_strs"] == theirs.convert_ids_to_tokens(said["tokens"])
        text = post(client, "/detokenize", model=kind, tokens=said["tokens"])["prompt"]
        assert text == theirs.decode(said["tokens"])
        body = {"model": kind, "prompt": TEXT, "max_tokens": 1, "add_special_tokens": special}
        assert post(client, "/v1/completions", **body)["usage"]["prompt_tokens"] == said["count"]
    assert post(client, "/tokenize", model=kind, prompt=theirs.eos_token)["tokens"] == [theirs.eos_token_id]


def test_the_default_models_special_tokens_are_described(client: httpx2.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_offsets_fit_the_echoed_text_though_bos_has_none(client: httpx2.Client, kind: str) -> None:
    body = {"model": kind, "prompt": "The cat sat", "max_tokens": 4, "echo": True, "logprobs": 0, "seed": 3}
    choice = post(client, "/v1/completions", **body)["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert choice["text"].startswith("The cat sat")
    assert offsets[:2] == [0, 0]
    length = len(post(client, "/tokenize", model=kind, prompt="The cat sat")["tokens"])
    assert "".join(tokens[1:length]) == "The cat sat"
    assert offsets[length] == len("The cat sat")


def test_an_empty_prompt_is_bos_alone(client: httpx2.Client) -> None:
    for prompt in ("", []):
        said = post(client, "/v1/completions", model="llama2", prompt=prompt, max_tokens=1)
        assert said["usage"]["prompt_tokens"] == 1


def test_a_text_that_the_tokenizer_cannot_split_is_refused(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> list[int]:
        raise TokenizerError("the tokenizer cannot split a text of 1 characters")

    monkeypatch.setattr("gptcore.hf_tokenizer.PublishedEncoding.encode", cannot)
    for path in ("/v1/completions", "/generate", "/tokenize"):
        reply = client.post(path, json={"model": "llama3", "prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
        assert "cannot split" in reply.json()["error"]["message"]


def test_a_switch_that_is_neither_true_nor_false_is_refused(client: httpx2.Client) -> None:
    for path in ("/v1/completions", "/generate", "/tokenize"):
        reply = client.post(path, json={"model": "llama3", "prompt": "x", "add_special_tokens": "yes"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "add_special_tokens")
