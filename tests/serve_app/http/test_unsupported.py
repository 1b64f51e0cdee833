"""Parameters of other servers: accepted at values that change nothing, refused by name otherwise."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.errors import ApiError
from serve_app.http.schemas import CompletionRequest, GenerateRequest, PromptRequest, SentenceRequest, StreamOptions
from serve_app.http.unsupported import BY_NAME, UNSUPPORTED

BODIES: dict[Any, dict[str, Any]] = {
    CompletionRequest: {"model": "tiny", "prompt": "x"},
    GenerateRequest: {"prompt": "x"},
    PromptRequest: {"prompt": "x"},
    SentenceRequest: {"text": "x"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vLLM": dict(
        use_beam_search=False,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
        length_penalty=1.0,
        stop_token_ids=[],
        include_stop_str_in_output=False,
        ignore_eos=False,
        min_tokens=0,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        truncate_prompt_tokens=None,
        allowed_token_ids=None,
        prompt_logprobs=None,
        add_special_tokens=True,
        response_format={"type": "text"},
        priority=0,
        request_id="cmpl-1",
        return_token_ids=False,
        vllm_xargs={},
    ),
    "OpenAI": dict(
        stop="",
        store=False,
        metadata={},
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="auto",
        user="me",
        logit_bias={},
        suffix="",
        safety_identifier="me",
        top_logprobs=0,
    ),
    "llama.cpp": dict(
        top_k=0,
        typical_p=1.0,
        repeat_penalty=1.0,
        repeat_last_n=64,
        mirostat=0,
        mirostat_tau=5.0,
        mirostat_eta=0.1,
        dynatemp_range=0.0,
        xtc_probability=0.0,
        xtc_threshold=0.1,
        dry_multiplier=0.0,
        dry_base=1.75,
        grammar="",
        json_schema={},
        n_probs=0,
        n_keep=0,
        min_keep=0,
        id_slot=-1,
        cache_prompt=True,
        samplers=[],
        lora=[],
    ),
    "Text Generation Inference": dict(
        do_sample=True,
        typical_p=None,
        watermark=False,
        details=False,
        decoder_input_details=False,
        return_full_text=None,
        truncate=None,
        top_n_tokens=None,
        adapter_id=None,
        stop=[],
    ),
    "Hugging Face": dict(
        num_beams=1, early_stopping=False, no_repeat_ngram_size=0, min_new_tokens=0, use_cache=True, penalty_alpha=0.0
    ),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("server", DEFAULTS)
def test_the_default_values_of_other_servers_clients_are_accepted(server: str, body: Any) -> None:
    assert body(**BODIES[body], **DEFAULTS[server]).params() == body(**BODIES[body]).params()


@pytest.mark.parametrize("body", BODIES)
def test_null_for_another_servers_parameter_is_the_same_as_leaving_it_out(body: Any) -> None:
    nothing = dict.fromkeys(BY_NAME)
    assert body(**nothing | BODIES[body]).params() == body(**BODIES[body]).params()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_tokens", 5),
        ("min_tokens", False),
        ("skip_special_tokens", False),
        ("skip_special_tokens", 1),
        ("store", True),
        ("store", 0),
        ("metadata", {"a": "b"}),
        ("service_tier", "priority"),
        ("length_penalty", 0.8),
        ("use_beam_search", True),
        ("best_of", 3),
        ("do_sample", False),
        ("repeat_penalty", 1.1),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("logit_bias", {"5": 1}),
        ("xtc_threshold", "high"),
        ("truncate_prompt_tokens", 8),
        ("messages", []),
        ("request_id", 7),
    ],
)
def test_any_other_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as refused:
        CompletionRequest(model="tiny", prompt="x", **{name: value})
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, name, "unsupported_parameter")
    assert name in refused.value.message


def test_a_refusal_says_why_and_what_would_work() -> None:
    with pytest.raises(ApiError) as refused:
        GenerateRequest(prompt="x", min_tokens=5)
    reason = "there is no minimum length; see ignore_eos"
    assert refused.value.message == f"min_tokens is not supported as 5: {reason}; leave it out or send 0"


def test_another_routes_name_for_the_length_is_answered_with_the_right_one() -> None:
    with pytest.raises(ApiError, match="use max_new_tokens instead"):
        GenerateRequest(prompt="x", max_tokens=5)
    with pytest.raises(ApiError, match="use max_tokens instead"):
        CompletionRequest(model="tiny", max_new_tokens=5)


def test_each_parameter_of_other_servers_is_listed_once() -> None:
    names = [name for group in UNSUPPORTED.values() for name in group]
    assert len(names) == len(set(names))


def test_whole_numbers_may_have_a_decimal_point() -> None:
    body = CompletionRequest(
        model="tiny",
        prompt=[[1.0, 2], [3, 4.0]],
        max_tokens=10.0,
        n=2.0,
        seed=7.0,
        logprobs=3.0,
        top_k=40.0,
        stop_token_ids=[5.0],
    )
    assert (body.max_tokens, body.n, body.seed, body.logprobs, body.top_k) == (10, 2, 7, 3, 40)
    assert (body.prompt, body.stop_token_ids) == ([[1, 2], [3, 4]], [5])
    for name, value in (("max_tokens", 10.5), ("n", "1"), ("seed", True), ("top_k", 1e300)):
        with pytest.raises(ValidationError, match=name):
            CompletionRequest(model="tiny", **{name: value})


def test_other_servers_ways_to_say_off_are_accepted() -> None:
    body = CompletionRequest(model="tiny", top_k=-1, logprobs=False, stop=["", "end"], best_of=1, n=2)
    params = body.params()
    assert (params.top_k, params.logprobs, params.stop) == (0, None, ("end",))
    for fields in ({"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        CompletionRequest(model="tiny", **fields)


@pytest.mark.parametrize("name", ["include_obfuscation", "continuous_usage_stats"])
@pytest.mark.parametrize("value", [0, 0.0, 1, True, "false"])
def test_an_unsupported_switch_accepts_only_false_as_the_schema_says(name: str, value: object) -> None:
    assert StreamOptions.model_validate({name: False})
    with pytest.raises(ValidationError, match="Input should be False"):
        StreamOptions.model_validate({name: value})
