"""schemathesis reads the app's OpenAPI document and sends requests that it allows and forbids, over HTTP.

No request may make the service fail, and every answer must match the document.
"""

import itertools
from collections.abc import Iterator

import httpx2
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, positive_data_acceptance

from gptcore.package import Package
from serve_app.settings import ServeSettings
from tests.chance import examples
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.running import Running, running
from tests.waiting import eventually

load_all_checks()
# What the document cannot say is refused, too: a prompt beyond the context, a token id beyond the vocabulary.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def service(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Checks at the end that the service gives the same answers and nothing is left behind."""
    root = tmp_path_factory.mktemp("talker")
    talker = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "model", 512, "llama")
    (talker / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    models = (f"tiny={package.path}", f"talker={talker}")
    with running(ServeSettings(models=models, dtype="float32")) as service:
        asked = dict(prompt="The future of AI is", seed=7, max_new_tokens=16)
        before = httpx2.post(f"{service.url}/generate", json=asked).json()["choices"]
        yield service
        eventually(lambda: service.leases == 0 and service.stats.slots_used == 0, "slots and leases are given back")
        assert httpx2.get(f"{service.url}/health").status_code == 200
        assert httpx2.post(f"{service.url}/generate", json=asked).json()["choices"] == before


@pytest.fixture(scope="module")
def operations(service: Running) -> list[schemathesis.APIOperation]:
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    return [result.ok() for result in document.get_all_operations()]


@pytest.mark.hypothesis
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_request_gets_a_documented_answer(
    operations: list[schemathesis.APIOperation], mode: GenerationMode
) -> None:
    assert len(operations) >= 10
    for operation in operations:
        if operation.body or mode is GenerationMode.POSITIVE:  # without a body there is nothing to get wrong
            attempt(operation, mode)


def attempt(operation: schemathesis.APIOperation, mode: GenerationMode) -> None:
    """Sends cases of the operation; half of those that name a model name the one that is there."""

    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    @examples(25)
    def send(case: schemathesis.Case, aimed: bool) -> None:
        if aimed and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "talker" if "chat" in operation.path else "tiny"
        if aimed and "model" in (case.path_parameters or {}):
            case.path_parameters["model"] = "tiny"
        case.call_and_validate(excluded_checks=EXCLUDED)

    send()


OUTERMOST: dict[str, tuple[float, float]] = {
    "temperature": (5e-324, 1.7e308),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (5e-324, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "top_k": (0, 2**31 - 1),
}


def test_no_combination_of_extreme_values_harms_the_engine(service: Running) -> None:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        for values in itertools.product(*OUTERMOST.values()):
            asked = dict(zip(OUTERMOST, values, strict=True))
            reply = client.post("/generate", json={"prompt": "to be or not to be", "max_new_tokens": 4, **asked})
            assert reply.status_code in (200, 400), (asked, reply.text)
            assert service.engine.alive, asked
