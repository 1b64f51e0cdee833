"""Parameters that clients of other servers send and this service does not have, and which of their values mean "off".

In comes a request's body, out goes the body without those that ask for nothing. Any other value of theirs is refused
by name, with the reason: a parameter that was ignored would be a promise that is not kept. The names are those of
OpenAI, vLLM, llama.cpp's server, Text Generation Inference, SGLang and Hugging Face's `generate`.

Under each reason stand the parameters, each with the values that are let in. A type among them stands for each of its
values: the parameter changes nothing here, whatever it says. `null` is the same as leaving a parameter out.
"""

from collections.abc import Collection, Mapping
from typing import Any

from serve_app.errors import ApiError, shown

ZERO: Any = (0,)
FALSE: Any = (False,)
NOTHING: Any = ("", [], {})

UNSUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "text is continued at its end only": {"suffix": ("",)},
    "the logits cannot be biased token by token; see temperature, the penalties and stop_token_ids": {
        "logit_bias": NOTHING,
        "allowed_token_ids": NOTHING,
        "bad_words": NOTHING,
        "logits_processors": NOTHING,
    },
    "this is the completions route and these models have no chat format; send a prompt": {
        "messages": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    },
    "the prompt is text or token ids": {
        "prompt_embeds": (),
        "modalities": (["text"],),
        "audio": (),
        "image_data": ([],),
    },
    "these models call no tools": {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (bool,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "web_search_options": (),
    },
    "the text's form cannot be prescribed": {
        "response_format": ({}, {"type": "text"}),
        "grammar": ("",),
        "json_schema": NOTHING,
        "regex": ("",),
        "ebnf": ("",),
        "structured_outputs": ({},),
        "guided_json": NOTHING,
        "guided_regex": ("",),
        "guided_choice": ([],),
        "guided_grammar": ("",),
        "prediction": (),
    },
    "the length is called {length} here": {
        "max_tokens": (),
        "max_new_tokens": (),
        "max_completion_tokens": (),
        "n_predict": (),
    },
    "a least length cannot be asked for; see ignore_eos": {
        "min_tokens": ZERO,
        "min_new_tokens": ZERO,
        "min_length": ZERO,
    },
    "logprobs is the number of alternatives here, and echo adds the prompt's": {
        "top_logprobs": ZERO,
        "n_probs": ZERO,
        "top_n_tokens": ZERO,
        "prompt_logprobs": FALSE,
        "decoder_input_details": FALSE,
        "details": FALSE,
        "post_sampling_probs": FALSE,
        "logprob_start_len": (-1,),
    },
    "there is no beam search": {
        "use_beam_search": FALSE,
        "num_beams": (1,),
        "length_penalty": (1,),
        "early_stopping": FALSE,
        "diversity_penalty": ZERO,
        "num_return_sequences": (1,),
    },
    "the tokens are sampled, with temperature 0 the likeliest is taken": {"do_sample": (True,)},
    "the way of sampling is not known here; there are top_k, top_p and min_p": {
        "typical_p": (1,),
        "tfs_z": (1,),
        "top_a": ZERO,
        "top_n_sigma": (-1, 0),
        "epsilon_cutoff": ZERO,
        "eta_cutoff": ZERO,
        "penalty_alpha": ZERO,
        "xtc_probability": ZERO,
        "dynatemp_range": ZERO,
        "smoothing_factor": ZERO,
        "mirostat": ZERO,
        "mirostat_mode": ZERO,
        "adaptive_target": (-1,),
        "min_keep": (0, 1),
        "samplers": ([],),
    },
    "the method that it belongs to is not there, and it changes nothing without": {
        "xtc_threshold": (int, float),
        "dynatemp_exponent": (int, float),
        "smoothing_curve": (int, float),
        "mirostat_tau": (int, float),
        "mirostat_eta": (int, float),
        "repeat_last_n": (int,),
        "dry_base": (int, float),
        "dry_allowed_length": (int,),
        "dry_penalty_last_n": (int,),
        "dry_sequence_breakers": (list,),
    },
    "repetition is penalised by repetition_penalty, presence_penalty and frequency_penalty": {
        "repeat_penalty": (1,),
        "dry_multiplier": ZERO,
        "no_repeat_ngram_size": ZERO,
        "encoder_no_repeat_ngram_size": ZERO,
        "encoder_repetition_penalty": (1,),
        "penalize_nl": FALSE,
    },
    "a text is always given without special tokens, and up to a stop string": {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (bool,),
        "include_stop_str_in_output": FALSE,
        "no_stop_trim": FALSE,
        "detokenize": (True,),
    },
    "the reply's form is the one documented": {
        "return_tokens_as_token_ids": FALSE,
        "return_token_ids": FALSE,
        "return_tokens": FALSE,
        "return_full_text": FALSE,
        "return_hidden_states": FALSE,
        "timings_per_token": FALSE,
        "return_progress": FALSE,
        "include_reasoning": (bool,),
        "response_fields": ([],),
    },
    "a prompt is taken whole": {
        "truncate_prompt_tokens": (),
        "truncate": (),
        "truncation": FALSE,
        "n_keep": ZERO,
        "n_discard": ZERO,
    },
    "these tokenizers add no special tokens, so it changes nothing": {"add_special_tokens": (bool,)},
    "text carries no watermark": {"watermark": FALSE},
    "there are no adapters; name another model": {
        "adapter_id": ("",),
        "lora": ([],),
        "lora_path": ("",),
    },
    "nothing is kept of a request": {"store": FALSE, "metadata": ({},)},
    "requests are served as they come": {
        "service_tier": ("auto", "default"),
        "priority": ZERO,
        "id_slot": (-1,),
        "t_max_predict_ms": (-1, 0),
        "kv_transfer_params": ({},),
        "vllm_xargs": ({},),
        "cache_salt": (),
    },
    "it is a name or a note of the client's own, and expected as text": {
        "user": (str,),
        "request_id": (str,),
        "rid": (str,),
        "safety_identifier": (str,),
        "prompt_cache_key": (str,),
        "prompt_cache_retention": (str,),
    },
    "what prompts have in common is computed once, and changes no text": {
        "cache_prompt": (bool,),
        "use_cache": (bool,),
    },
}
"""Why a parameter is not taken, to the parameters and those of their values that are let in."""

BY_NAME = {name: (reason, off) for reason, group in UNSUPPORTED.items() for name, off in group.items()}


def drop_unsupported(body: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`body` without the foreign parameters that ask for nothing; those among the route's own `fields` stay.

    Raises ApiError 400 for one that asks for something.
    """
    kept = {}
    for name, value in body.items():
        if name in fields or name not in BY_NAME:
            kept[name] = value
            continue
        reason, off = BY_NAME[name]
        if value is not None and not any(_is(value, one) for one in off):
            raise _refused(name, value, reason.format(length=_length(fields)), off)
    return kept


def _is(value: Any, one: Any) -> bool:
    """Whether `value` is the same JSON as `one`, or of the type `one`. True is no 1, but 1.0 is."""
    if isinstance(one, type):
        return type(value) is one
    numbers = all(type(number) in (int, float) for number in (value, one))
    return (numbers or type(value) is type(one)) and value == one


def _length(fields: Collection[str]) -> str:
    return "max_tokens" if "max_tokens" in fields else "max_new_tokens"


def _refused(name: str, value: Any, reason: str, off: tuple[Any, ...]) -> ApiError:
    values = [shown(one) for one in off if not isinstance(one, type)]
    instead = f"leave it out{f' or send {values[-1]}' if values else ''}"
    message = f"{name} is not supported as {shown(value)}: {reason}; {instead}"
    return ApiError(400, message, param=name, code="unsupported_parameter")
