"""Parameters of other servers that this service does not support, and the values of them that it accepts.

A value that means "off" is dropped from the body. Any other value is refused, naming the parameter and the reason,
rather than silently ignored. The names come from OpenAI, vLLM, llama.cpp's server, Text Generation Inference, SGLang
and Hugging Face's `generate`.

Each reason lists its parameters with their accepted values. A type stands for all of its values: the parameter has no
effect here. `null` is the same as leaving a parameter out.
"""

from collections.abc import Collection, Mapping
from typing import Any

from serve_app.errors import ApiError, shown

ZERO: Any = (0,)
FALSE: Any = (False,)
NOTHING: Any = ("", [], {})

UNSUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "text can only be continued at its end": {"suffix": ("",)},
    "single tokens cannot be biased; use temperature, the penalties or stop_token_ids": {
        "logit_bias": NOTHING,
        "allowed_token_ids": NOTHING,
        "bad_words": NOTHING,
        "logits_processors": NOTHING,
    },
    "send messages to /v1/chat/completions, and a prompt here": {
        "messages": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (),
        "continue_final_message": FALSE,
    },
    "the model's own chat template is used": {"chat_template": ()},
    "there is no separate reasoning; see chat_template_kwargs": {
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    },
    "the prompt must be text or token ids": {
        "prompt_embeds": (),
        "modalities": (["text"],),
        "audio": (),
        "image_data": ([],),
    },
    "these models cannot call tools": {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (bool,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "web_search_options": (),
    },
    "structured output is not supported": {
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
    "use {length} instead": {
        "max_tokens": (),
        "max_new_tokens": (),
        "max_completion_tokens": (),
        "n_predict": (),
    },
    "there is no minimum length; see ignore_eos": {
        "min_tokens": ZERO,
        "min_new_tokens": ZERO,
        "min_length": ZERO,
    },
    "use logprobs for the number of alternatives, and echo to include the prompt's": {
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
    "use temperature 0 for greedy decoding": {"do_sample": (True,)},
    "this sampling method is not supported; there are top_k, top_p and min_p": {
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
    "it belongs to an unsupported method, and has no effect": {
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
    "use repetition_penalty, presence_penalty or frequency_penalty": {
        "repeat_penalty": (1,),
        "dry_multiplier": ZERO,
        "no_repeat_ngram_size": ZERO,
        "encoder_no_repeat_ngram_size": ZERO,
        "encoder_repetition_penalty": (1,),
        "penalize_nl": FALSE,
    },
    "replies never contain special tokens or stop strings": {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (bool,),
        "include_stop_str_in_output": FALSE,
        "no_stop_trim": FALSE,
        "detokenize": (True,),
    },
    "the format of replies is fixed": {
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
    "prompts are never shortened, and conversations only with truncate": {
        "truncate_prompt_tokens": (),
        "truncate": (),
        "truncation": FALSE,
        "n_keep": ZERO,
        "n_discard": ZERO,
    },
    "the tokenizer decides what a prompt begins with": {"add_special_tokens": (True,)},
    "watermarks are not supported": {"watermark": FALSE},
    "adapters are not supported; choose another model": {
        "adapter_id": ("",),
        "lora": ([],),
        "lora_path": ("",),
    },
    "requests are not stored": {"store": FALSE, "metadata": ({},)},
    "requests have no priorities": {
        "service_tier": ("auto", "default"),
        "priority": ZERO,
        "id_slot": (-1,),
        "t_max_predict_ms": (-1, 0),
        "kv_transfer_params": ({},),
        "vllm_xargs": ({},),
        "cache_salt": (),
    },
    "it must be text; it has no effect": {
        "user": (str,),
        "request_id": (str,),
        "rid": (str,),
        "safety_identifier": (str,),
        "prompt_cache_key": (str,),
        "prompt_cache_retention": (str,),
    },
    "common beginnings of prompts are always cached; it must be true or false": {
        "cache_prompt": (bool,),
        "use_cache": (bool,),
    },
}
"""Reason -> parameter -> accepted values."""

BY_NAME = {name: (reason, off) for reason, group in UNSUPPORTED.items() for name, off in group.items()}


def drop_unsupported(body: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`body` without unsupported parameters that are off; the route's own `fields` stay.

    Raises ApiError 400 for an unsupported parameter with any other value.
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
    """Whether `value` is the same JSON as `one`, or of the type `one`. True is not 1, but 1.0 is."""
    if isinstance(one, type):
        return type(value) is one
    numbers = all(type(number) in (int, float) for number in (value, one))
    return (numbers or type(value) is type(one)) and value == one


def _length(fields: Collection[str]) -> str:
    return next(name for name in ("max_completion_tokens", "max_tokens", "max_new_tokens", "nothing") if name in fields)


def _refused(name: str, value: Any, reason: str, off: tuple[Any, ...]) -> ApiError:
    values = [shown(one) for one in off if not isinstance(one, type)]
    instead = f"leave it out{f' or send {values[-1]}' if values else ''}"
    message = f"{name} is not supported as {shown(value)}: {reason}; {instead}"
    return ApiError(400, message, param=name, code="unsupported_parameter")
