"""`POST /generate` of the real service, as curl and the playground use it."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from gptcore.generate import parse_arguments
from gptcore.package import Package
from gptcore.sampling import SamplingParams, generate_text
from serve_app.chat.values import SHAPES, Values, default
from serve_app.http.parameters import Parameters
from serve_app.http.schemas import CompletionRequest, GenerateRequest, PromptRequest
from serve_app.settings import ServeSettings
from tests.serve_app.running import Running, running

PROMPT = "The future of AI is"
FIXED: dict[str, Any] = dict(prompt=PROMPT, seed=7, max_new_tokens=12)


@pytest.fixture(scope="module")
def service(package: Package) -> Iterator[Running]:
    with running(ServeSettings(models=(f"tiny={package.path}",), dtype="float32")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


def ask(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    reply = client.post("/generate", json={**FIXED, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    """The events' data; the last must be [DONE]."""
    with client.stream("POST", "/generate", json={**FIXED, **fields, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        *events, done = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"] if choice["index"] == index)


def test_a_reply_names_its_kind_and_its_model(client: httpx2.Client) -> None:
    reply = client.post("/generate", json={**FIXED, "ignore_eos": True})
    body = reply.json()
    assert body["id"].startswith("gen-")
    assert reply.headers["x-model-version"] == f"{body['model']}/{body['version']}"
    assert (body["model"], body["seed"]) == ("tiny", 7)
    assert [(c["index"], c["finish_reason"], c["logprobs"]) for c in body["choices"]] == [(0, "length", None)]
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == len(PROMPT) + 12


def test_the_text_equals_the_one_on_the_command_line(client: httpx2.Client, package: Package) -> None:
    params = SamplingParams(max_new_tokens=12, seed=7)
    expected = generate_text(package.load_model(), package.tokenizer, PROMPT, params)
    assert ask(client)["choices"][0]["text"] == expected


def test_defaults_are_the_same_on_the_command_line_in_each_route_and_in_the_chat() -> None:
    _, _, on_the_command_line, _ = parse_arguments(["package"])
    assert on_the_command_line == SamplingParams() == GenerateRequest(prompt="").params()
    assert {name: default(name) for name in SHAPES} == Parameters().model_dump()
    assert Values().body() == {}
    # These two have their own default lengths, which their clients expect.
    lengths = {"max_new_tokens": SamplingParams().max_new_tokens}
    for body in (CompletionRequest(model="tiny"), PromptRequest(prompt="")):
        assert replace(body.params(), **lengths) == SamplingParams()


def test_curl_needs_no_content_type(service: Running) -> None:
    command = ["curl", "-sS", f"{service.url}/generate", "-d", json.dumps(FIXED)]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert said["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_streamed_text_equals_the_unstreamed_one(client: httpx2.Client) -> None:
    whole = ask(client)
    *parts, last = stream(client)
    assert joined(parts) == whole["choices"][0]["text"]
    assert all(part.keys() == {"id", "model", "version", "seed", "choices"} for part in parts)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], whole["usage"]["completion_tokens"])
    reasons = [choice["finish_reason"] for part in parts for choice in part["choices"]]
    assert reasons == [None] * (len(parts) - 1) + [whole["choices"][0]["finish_reason"]]


def test_a_random_seed_is_reported_and_reproduces_the_text(client: httpx2.Client) -> None:
    drawn = ask(client, seed=None)
    assert ask(client, seed=drawn["seed"])["choices"] == drawn["choices"]
    assert ask(client, seed=None)["seed"] != drawn["seed"]
    assert len({event["seed"] for event in stream(client, seed=None)}) == 1


def test_defaults_are_the_documented_ones(client: httpx2.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]
    documented = {name: field["default"] for name, field in schema.items() if "default" in field}
    assert (documented["max_new_tokens"], documented["temperature"]) == (128, 1.0)
    spelled = {name: value for name, value in documented.items() if value is not None and name != "max_new_tokens"}
    assert ask(client, **spelled)["choices"] == ask(client)["choices"]


def test_logprobs_report_every_token_streamed_or_not(client: httpx2.Client, package: Package) -> None:
    whole = ask(client, logprobs=3)
    tokens = whole["choices"][0]["logprobs"]
    assert len(tokens) == whole["usage"]["completion_tokens"]
    for token in tokens:
        ends = token["token_id"] == package.tokenizer.eot  # which adds nothing to the text
        assert (b"" if ends else package.tokenizer.decode_bytes([token["token_id"]])) == bytes(token["bytes"])
        assert [other["logprob"] for other in token["top"]] == sorted(
            (o["logprob"] for o in token["top"]), reverse=True
        )
        assert len(token["top"]) == 3
        assert token["top"][0].keys() == {"token_id", "text", "bytes", "logprob"}
    events = stream(client, logprobs=3)
    assert [token for event in events for c in event["choices"] for token in c["logprobs"]] == tokens


def test_too_many_logprobs_for_one_reply_are_refused_unless_streamed(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.generation.order.MOST_LOGPROBS", 100)
    asked = {"prompt": PROMPT, "max_new_tokens": 13, "n": 2, "logprobs": 3, "ignore_eos": True}
    refused = client.post("/generate", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert "may come to 104; at most 100 are allowed" in refused.json()["error"]["message"]
    assert client.post("/generate", json={**asked, "max_new_tokens": 12}).status_code == 200
    assert client.post("/generate", json={**asked, "stream": True}).status_code == 200


def test_echo_and_n_apply_to_each_choice(client: httpx2.Client) -> None:
    choices = ask(client, n=3, echo=True, logprobs=0)["choices"]
    assert all(choice["text"].startswith(PROMPT) for choice in choices)
    assert len({choice["text"] for choice in choices}) == 3
    assert all(len(choice["logprobs"]) == len(PROMPT) + 12 for choice in choices if choice["finish_reason"] == "length")
    events = stream(client, n=3, echo=True)
    assert [joined(events, index) for index in range(3)] == [choice["text"] for choice in choices]


def test_an_empty_prompt_begins_a_document_and_a_full_context_is_scored(client: httpx2.Client) -> None:
    begun = ask(client, prompt="")
    assert begun["usage"]["prompt_tokens"] == 1
    assert ask(client, prompt="", echo=True)["choices"] == begun["choices"]
    scored = ask(client, prompt="x" * 128, max_new_tokens=0, echo=True, logprobs=0)
    assert (scored["choices"][0]["text"], scored["usage"]["completion_tokens"]) == ("x" * 128, 0)
    assert len(scored["choices"][0]["logprobs"]) == 128


def test_a_long_prompt_is_answered_like_a_short_one(make_package: Any) -> None:
    package = make_package(context_length=6000)
    with running(ServeSettings(models=(f"long={package.path}",))) as service:
        reply = httpx2.post(f"{service.url}/generate", json={**FIXED, "prompt": "é" * 2500}, timeout=60).json()
    assert reply["usage"]["prompt_tokens"] == 5000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 128}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**12}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 10**6}, "n"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"max_tokens": 3}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields_are_refused_by_name(client: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    reply = client.post("/generate", json={**FIXED, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param in error["message"]
    assert len(reply.content) < 1000


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_nan_and_infinity_are_refused(client: httpx2.Client, value: str) -> None:
    reply = client.post("/generate", content=f'{{"prompt": "x", "temperature": {value}}}')
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")


def test_an_unknown_model_is_a_404_with_the_nearest_name(client: httpx2.Client) -> None:
    reply = client.post("/generate", json={**FIXED, "model": "tinny"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny'" in reply.json()["error"]["message"]
