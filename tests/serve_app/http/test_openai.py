"""The official `openai` client against the real service: OpenAI's features work or are refused by name."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion

from gptcore.engine import Update
from gptcore.package import Package
from serve_app.settings import ServeSettings
from tests.serve_app.running import Running, running
from tests.waiting import eventually

PROMPT = "The future of AI is"
FIXED: dict[str, Any] = dict(model="tiny", seed=7, max_tokens=12)


@pytest.fixture(scope="module")
def service(package: Package) -> Iterator[Running]:
    with running(ServeSettings(models=(f"tiny={package.path}",), dtype="float32", slots=8)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none is asked for", max_retries=0) as client:
        yield client


def texts(completion: Completion) -> list[str]:
    return [choice.text for choice in completion.choices]


def streamed(client: openai.OpenAI, **fields: Any) -> list[Completion]:
    return list(client.completions.create(stream=True, **fields))


def joined(events: list[Completion], index: int = 0) -> str:
    return "".join(choice.text for event in events for choice in event.choices if choice.index == index)


def refused(client: openai.OpenAI, **fields: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**FIXED, "prompt": PROMPT, **fields})
    return caught.value


def test_a_completion_has_openais_form_and_counts_every_token(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.model == "tiny"
    assert reply.system_fingerprint.startswith("tiny/")
    assert [(c.index, c.finish_reason, c.logprobs) for c in reply.choices] == [(0, "length", None)]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPT), 16)  # OpenAI's default length
    assert reply.usage.total_tokens == len(PROMPT) + 16


def test_the_reply_names_the_version_in_its_header_too(client: openai.OpenAI) -> None:
    reply = client.completions.with_raw_response.create(**FIXED, prompt=PROMPT)
    assert reply.headers["x-model-version"] == reply.parse().system_fingerprint


def test_a_streamed_text_and_its_usage_equal_the_unstreamed_ones(client: openai.OpenAI) -> None:
    whole = client.completions.create(**FIXED, prompt=PROMPT)
    events = streamed(client, **FIXED, prompt=PROMPT, stream_options={"include_usage": True})
    assert joined(events) == whole.choices[0].text
    assert len(events) > 1  # a reader that lags gets several tokens in one
    *parts, last = events
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert all("usage" in part.model_fields_set and part.usage is None for part in parts)
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole.choices[0].finish_reason]
    assert {event.id for event in events} == {last.id}


def test_a_stream_has_no_usage_unless_asked(client: openai.OpenAI) -> None:
    assert all("usage" not in event.model_fields_set for event in streamed(client, **FIXED, prompt=PROMPT))


def test_the_same_seed_gives_the_same_text_and_another_one_another(client: openai.OpenAI) -> None:
    first, again = (texts(client.completions.create(**FIXED, prompt=PROMPT)) for _ in range(2))
    assert first == again
    assert first != texts(client.completions.create(**{**FIXED, "seed": 8}, prompt=PROMPT))


def test_n_gives_different_choices_and_the_first_equals_a_single_one(client: openai.OpenAI) -> None:
    alone = client.completions.create(**FIXED, prompt=PROMPT)
    several = client.completions.create(**FIXED, prompt=PROMPT, n=3, best_of=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts(several))) == 3
    assert several.choices[0].text == alone.choices[0].text
    assert several.usage.prompt_tokens == len(PROMPT)
    events = streamed(client, **FIXED, prompt=PROMPT, n=3)
    assert [joined(events, index) for index in range(3)] == texts(several)


def test_each_prompt_of_a_list_gets_the_same_continuation_as_alone(client: openai.OpenAI) -> None:
    prompts = ["one", "and two", "three, at last"]
    alone = [texts(client.completions.create(**FIXED, prompt=prompt, n=2)) for prompt in prompts]
    together = client.completions.create(**FIXED, prompt=prompts, n=2)
    assert texts(together) == [text for both in alone for text in both]
    assert together.usage.prompt_tokens == sum(map(len, prompts))
    assert together.usage.completion_tokens <= 6 * 12


def test_prompts_may_be_token_ids_and_lists_of_them(client: openai.OpenAI, package: Package) -> None:
    one, two = (package.tokenizer.encode(text) for text in (PROMPT, "two"))
    text = texts(client.completions.create(**FIXED, prompt=PROMPT))
    assert texts(client.completions.create(**FIXED, prompt=one)) == text
    assert texts(client.completions.create(**FIXED, prompt=[one, two]))[:1] == text
    assert client.completions.create(**FIXED, prompt=one, echo=True).choices[0].text == PROMPT + text[0]


def test_no_prompt_begins_a_document(client: openai.OpenAI, package: Package) -> None:
    eot = package.tokenizer.eot
    begun = client.completions.create(**FIXED, prompt=None)
    assert texts(begun) == texts(client.completions.create(**FIXED, prompt=[eot]))


def test_echo_begins_the_text_with_the_prompt_streamed_or_not(client: openai.OpenAI) -> None:
    plain = texts(client.completions.create(**FIXED, prompt=PROMPT))
    assert texts(client.completions.create(**FIXED, prompt=PROMPT, echo=True)) == [PROMPT + plain[0]]
    assert joined(streamed(client, **FIXED, prompt=PROMPT, echo=True)) == PROMPT + plain[0]


def test_logprobs_name_the_chosen_token_and_the_likeliest(client: openai.OpenAI) -> None:
    reply = client.completions.create(**{**FIXED, "temperature": 0}, prompt=PROMPT, logprobs=3)
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == reply.usage.completion_tokens
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top, key=top.__getitem__) == token  # greedy: the likeliest was chosen
        assert top[token] == logprob <= 0


def test_text_offsets_say_where_each_token_begins(client: openai.OpenAI) -> None:
    prompt = "Füße – 東京"
    choice = client.completions.create(**{**FIXED, "max_tokens": 60}, prompt=prompt, echo=True, logprobs=0).choices[0]
    text, found = choice.text, choice.logprobs
    spelled = list(zip(found.text_offset, found.tokens, strict=True))
    assert text.startswith(prompt)
    assert found.text_offset == sorted(found.text_offset)
    whole = [(at, token) for at, token in spelled if not token.startswith("bytes:")]
    assert any(at > len(prompt) for at, _ in whole)
    assert all(text[at] == token for at, token in whole if at < len(text))
    # Three tokens, one byte each, are one character.
    at = prompt.index("東")
    assert [entry for entry in spelled if entry[0] == at] == [(at, f"bytes:\\x{byte:02x}") for byte in "東".encode()]


def test_an_ignored_end_of_text_token_does_not_shift_the_offsets(client: openai.OpenAI) -> None:
    fields = {**FIXED, "max_tokens": 90, "temperature": 2, "logprobs": 0, "extra_body": {"ignore_eos": True}}
    choices = (client.completions.create(**{**fields, "seed": seed}, prompt=PROMPT).choices[0] for seed in range(100))
    choice = next(choice for choice in choices if "<|endoftext|>" in choice.logprobs.tokens[:-1])
    spelled = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert choice.logprobs.text_offset[-1] <= len(choice.text)
    assert all(choice.text[at] == token for at, token in spelled if len(token) == 1 and at < len(choice.text))


def test_unsupported_parameters_are_accepted_at_their_default(client: openai.OpenAI) -> None:
    for fields in (dict(suffix=""), dict(logit_bias={}), dict(extra_body={"tools": None})):
        assert client.completions.create(**FIXED, prompt=PROMPT, **fields).choices[0].text
    options: Any = {"include_usage": True, "include_obfuscation": False}
    assert streamed(client, **FIXED, prompt=PROMPT, stream_options=options)


def test_streamed_logprobs_joined_equal_the_unstreamed_ones(client: openai.OpenAI) -> None:
    fields = dict(**FIXED, prompt=PROMPT, logprobs=2, echo=True)
    whole = client.completions.create(**fields).choices[0].logprobs
    parts = [c.logprobs for event in streamed(client, **fields) for c in event.choices if c.logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts for entry in getattr(part, name)] == getattr(whole, name)


def test_echoed_logprobs_are_the_models_own_for_the_prompt(client: openai.OpenAI, package: Package) -> None:
    reply = client.completions.create(**FIXED, prompt=PROMPT, echo=True, logprobs=1)
    found = reply.choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    ids = torch.tensor([package.tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        logits = package.load_model()(ids)[0, :-1, : package.tokenizer.vocab_size]
    expected = logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1 : len(PROMPT)]), expected, atol=2e-4, rtol=1e-4)


def test_max_tokens_0_with_echo_reports_on_the_prompt_and_generates_nothing(client: openai.OpenAI) -> None:
    fields = dict(model="tiny", prompt=PROMPT, seed=7, echo=True, logprobs=1)
    scored, longer = (client.completions.create(**fields, max_tokens=n) for n in (0, 3))
    assert texts(scored) == [PROMPT]
    assert scored.choices[0].finish_reason == "length"
    assert (scored.usage.completion_tokens, scored.usage.total_tokens) == (0, len(PROMPT))
    a, b = scored.choices[0].logprobs, longer.choices[0].logprobs
    assert a.token_logprobs == b.token_logprobs[: len(PROMPT)]
    assert joined(streamed(client, **fields, max_tokens=0)) == PROMPT


def test_a_prompt_that_fills_the_context_is_scored_and_a_longer_one_is_refused(client: openai.OpenAI) -> None:
    context = 128
    fields: dict[str, Any] = dict(model="tiny", max_tokens=0, echo=True, logprobs=1)
    full, ids = "x" * context, [120] * context
    for prompt in (full, ids, [full, full], [ids, ids]):
        scored = client.completions.create(**fields, prompt=prompt)
        assert set(texts(scored)) == {full}
        assert all(len(choice.logprobs.token_logprobs) == context for choice in scored.choices)
        assert scored.usage.completion_tokens == 0
    assert joined(streamed(client, **fields, prompt=full)) == full
    assert texts(client.completions.create(**{**fields, "logprobs": None}, prompt=full)) == [full]
    error = refused(client, **fields, prompt=full + "x")
    assert (error.param, "so at most 128 fit" in error.message) == ("prompt", True)
    assert "so at most 127 fit" in refused(client, prompt=full).message  # a token that is generated needs its place


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]], ids=repr)
def test_an_empty_prompt_is_the_same_as_no_prompt(client: openai.OpenAI, prompt: Any) -> None:
    absent = client.completions.create(**FIXED, prompt=None, echo=True, logprobs=1)
    empty = client.completions.create(**FIXED, prompt=prompt, echo=True, logprobs=1)
    assert empty.choices == absent.choices
    assert texts(absent) == texts(client.completions.create(**FIXED, prompt=None))  # nothing was sent to be echoed
    found = absent.choices[0].logprobs
    assert (found.tokens[0], found.text_offset[:2]) == ("<|endoftext|>", [0, 0])
    mixed = client.completions.create(**FIXED, prompt=[PROMPT, ""])
    assert texts(mixed)[1:] == texts(client.completions.create(**FIXED, prompt=None))


def test_logprobs_report_as_many_alternatives_as_openai(client: openai.OpenAI) -> None:
    found = client.completions.create(**FIXED, prompt=PROMPT, logprobs=20).choices[0].logprobs
    assert {len(top) for top in found.top_logprobs} == {20}


def test_the_limit_on_logprobs_counts_those_of_the_prompts(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = dict(model="tiny", max_tokens=1, echo=True, logprobs=20)
    assert len(client.completions.create(**fields, prompt=["short"] * 64).choices) == 64  # the context has 128 places
    assert refused(client, **fields, prompt=["x" * 120] * 64).param == "logprobs"


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    text = texts(client.completions.create(**FIXED, prompt=PROMPT, logprobs=0))[0]
    stop = text[5:7]
    for given in (stop, [stop, "never said"]):
        stopped = client.completions.create(**FIXED, prompt=PROMPT, stop=given)
        assert stopped.choices[0].text == text[: text.index(stop)]
        assert stopped.choices[0].finish_reason == "stop"
        assert joined(streamed(client, **FIXED, prompt=PROMPT, stop=given)) == text[: text.index(stop)]


def test_our_own_parameters_work_beside_openais(client: openai.OpenAI, package: Package) -> None:
    greedy = texts(client.completions.create(**FIXED, prompt=PROMPT, temperature=0))
    assert texts(client.completions.create(**FIXED, prompt=PROMPT, extra_body={"top_k": 1})) == greedy
    assert texts(client.completions.create(**FIXED, prompt=PROMPT, extra_body={"min_p": 1.0})) == greedy
    everything = list(range(package.tokenizer.vocab_size))[:64]
    ended = client.completions.create(
        **{**FIXED, "max_tokens": 100}, prompt=PROMPT, extra_body={"stop_token_ids": everything}
    )
    assert ended.choices[0].finish_reason == "stop"


def test_null_is_the_same_as_leaving_a_field_out(client: openai.OpenAI) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stop", "logprobs", "echo", "suffix", "logit_bias", "user"))
    with_nulls = client.completions.create(**FIXED, prompt=PROMPT, extra_body=nothing)
    assert texts(with_nulls) == texts(client.completions.create(**FIXED, prompt=PROMPT, user="me"))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        (dict(suffix="the end"), "suffix", "unsupported_parameter"),
        (dict(logit_bias={"50256": -100}), "logit_bias", "unsupported_parameter"),
        (dict(best_of=3), "best_of", "unsupported_parameter"),
        (dict(extra_body={"messages": []}), "messages", "unsupported_parameter"),
        (dict(extra_body={"temprature": 1.0}), "temprature", "unknown_parameter"),
        (dict(temperature=-1), "temperature", "invalid_value"),
        (dict(top_p=0), "top_p", "invalid_value"),
        (dict(logprobs=21), "logprobs", "invalid_value"),
        (dict(presence_penalty=2.1), "presence_penalty", "invalid_value"),
        (dict(max_tokens=0), "max_tokens", "invalid_value"),
        (dict(max_tokens=4097), "max_tokens", "invalid_value"),
        (dict(max_tokens="12"), "max_tokens", "invalid_value"),
        (dict(n=0), "n", "invalid_value"),
        (dict(n=1000), "n", "invalid_value"),
        (dict(stop=["x"] * 17), "stop", "invalid_value"),
        (dict(prompt=[1, "two"]), "prompt", "invalid_value"),
        (dict(prompt=[400]), "prompt", "invalid_value"),
        (dict(prompt="x" * 128), "prompt", "invalid_value"),
        (dict(prompt=["x"] * 1000), "prompt", "invalid_value"),
        (dict(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
        (dict(extra_body={"stop_token_ids": [257]}), "stop_token_ids", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_and_out_of_range_values_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    error = refused(client, **fields)
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert param in error.message


def test_an_unknown_field_gets_the_nearest_known_one_as_a_hint(client: openai.OpenAI) -> None:
    assert "Did you mean 'frequency_penalty'?" in refused(client, extra_body={"frequencypenalty": 1}).message


def test_a_refused_stream_has_the_status_of_the_error(client: openai.OpenAI) -> None:
    assert refused(client, prompt="x" * 128, stream=True).param == "prompt"


def test_the_model_must_be_named_and_known(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="tinny", prompt=PROMPT)
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    assert "tiny" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as missing:
        client.completions.create(model=None, prompt=PROMPT)  # type: ignore[call-overload]
    assert missing.value.param == "model"


def test_models_are_listed_and_described(client: openai.OpenAI, package: Package) -> None:
    assert [(model.id, model.object, model.owned_by) for model in client.models.list()] == [
        ("tiny", "model", "gpt-foundry")
    ]
    assert client.models.retrieve("tiny").created > 1_700_000_000
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("tinny")


def test_sixteen_streams_at_once_each_get_the_same_text_as_alone(service: Running, client: openai.OpenAI) -> None:
    prompts = [f"{n} green bottles" for n in range(16)]
    alone = [texts(client.completions.create(**FIXED, prompt=prompt))[0] for prompt in prompts]

    async def stream(crowd: openai.AsyncOpenAI, prompt: str) -> str:
        events = await crowd.completions.create(**FIXED, prompt=prompt, stream=True)
        return "".join([choice.text async for event in events for choice in event.choices])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as crowd:
            return await asyncio.gather(*(stream(crowd, prompt) for prompt in prompts))

    assert asyncio.run(all_at_once()) == alone
    eventually(lambda: service.leases == 0, "every lease is given back")


def test_an_engine_that_dies_during_a_stream_is_reported_as_an_error(package: Package) -> None:
    with (
        running(ServeSettings(models=(f"tiny={package.path}",))) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client,
    ):
        engine, steps, seen = service.engine.engine, iter(range(5)), threading.Event()
        step = engine.step

        def few_steps() -> list[Update]:
            if next(steps, None) is not None:
                return step()
            assert seen.wait(60)
            raise ZeroDivisionError

        engine.step = few_steps  # type: ignore[method-assign]
        events = iter(client.completions.create(**{**FIXED, "max_tokens": 100}, prompt=PROMPT, stream=True))
        next(events)
        seen.set()
        with pytest.raises(openai.APIError, match="engine"):
            list(events)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**FIXED, prompt=PROMPT)
        assert caught.value.status_code == 503
