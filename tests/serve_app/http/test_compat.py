"""The routes of this project's predecessors, used as their documentation says."""

from collections.abc import Iterator

import httpx2
import pytest

from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import running


@pytest.fixture(scope="module")
def client(make_package: MakePackage) -> Iterator[httpx2.Client]:
    """A service with a model called custom and one called gpt2."""
    models = tuple(f"{name}={make_package(seed).path}" for seed, name in enumerate(("custom", "gpt2")))
    with (
        running(ServeSettings(models=models, eager=("all",))) as service,
        httpx2.Client(base_url=service.url) as client,
    ):
        yield client


@pytest.mark.parametrize("model", ["custom", "gpt2"])
def test_generate_with_a_named_model_gives_prompt_and_continuation(client: httpx2.Client, model: str) -> None:
    reply = client.post(f"/generate/{model}", json={"prompt": "The future of AI is"})
    assert reply.status_code == 200
    assert reply.json().keys() == {"generated_text"}
    assert reply.json()["generated_text"].startswith("The future of AI is")
    assert len(reply.json()["generated_text"]) > len("The future of AI is")
    assert reply.headers["x-model-version"].startswith(f"{model}/")


def test_complete_sentence_gives_text_and_continuation(client: httpx2.Client) -> None:
    reply = client.post("/complete-sentence", json={"text": "The quick brown fox"})
    assert reply.status_code == 200
    assert reply.json().keys() == {"completed_sentence"}
    assert reply.json()["completed_sentence"].startswith("The quick brown fox")


def test_sampling_parameters_mean_the_same_as_on_other_routes(client: httpx2.Client) -> None:
    sampling = {"seed": 3, "max_new_tokens": 8, "temperature": 0.5}
    plain = client.post("/generate", json={"prompt": "x", "model": "gpt2", **sampling}).json()["choices"][0]["text"]
    named = client.post("/generate/gpt2", json={"prompt": "x", **sampling}).json()["generated_text"]
    assert named == "x" + plain
    default = client.post("/generate", json={"prompt": "x", **sampling}).json()["choices"][0]["text"]
    sentence = client.post("/complete-sentence", json={"text": "x", **sampling}).json()["completed_sentence"]
    assert sentence == "x" + default


def test_custom_is_the_services_default_model_unless_a_model_has_that_name(make_package: MakePackage) -> None:
    with running(ServeSettings(models=(f"mine={make_package().path}",))) as service:
        reply = httpx2.post(f"{service.url}/generate/custom", json={"prompt": "x"})
        assert reply.headers["x-model-version"].startswith("mine/")
        missing = httpx2.post(f"{service.url}/generate/gpt2", json={"prompt": "x"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate/custom", {}, "prompt"),
        ("/generate/custom", {"text": "x"}, "prompt"),
        ("/generate/custom", {"prompt": "x", "stream": True}, "stream"),
        ("/complete-sentence", {"text": None}, "text"),
        ("/complete-sentence", {"text": ["x"]}, "text"),
        ("/complete-sentence", {"text": "x", "max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_bad_bodies_are_refused_by_name(client: httpx2.Client, path: str, body: dict[str, object], param: str) -> None:
    reply = client.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
