"""OpenAI's chat API: `/v1/chat/completions`, for models whose tokenizer has a chat template.

The template makes a prompt of the messages, and from there on an answer is a continuation like any other: the same
limits, seeds, streams and log-probabilities. The beginning that a turn shares with the last one is in the engine's
cache.
"""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from gptcore.engine import TokenLogprob
from serve_app.generation.order import Order
from serve_app.generation.replies import Form, GenerationResponse, as_choices, as_events
from serve_app.generation.stream import Generation, generating
from serve_app.http.chat_schemas import ChatCompletion, ChatRequest
from serve_app.http.reply_schemas import EVENT_STREAM
from serve_app.state import AppState


def router(state: AppState) -> APIRouter:
    """The route `/v1/chat/completions`."""
    routes = APIRouter(prefix="/v1/chat", tags=["OpenAI"])

    @routes.post(
        "/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, "content": EVENT_STREAM}},
        summary="Answer a conversation",
    )
    async def completions(request: Request, body: ChatRequest) -> Response:
        order = Order(
            model=body.model,
            prompts=[body.conversation(state.settings.system_prompt)],
            prompt_field="messages",
            params=body.params(),
            n=body.n,
            length_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            default_length=body.length is None,
            stream=body.stream,
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        form = Form(
            lambda generation: _head(generation, truncates=body.truncate is not None),
            lambda: _logprobs,
            whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
            part=_delta,
            last_usage=usage,
            null_usage=usage,
        )
        write = as_events(form) if body.stream else as_choices(form)
        return GenerationResponse(generating(state, request.state.request_id, order), write)

    return routes


def _delta(text: str, first: bool) -> dict[str, Any]:
    """What an event adds to the message."""
    if first:
        return {"delta": {"role": "assistant", "content": text}}
    return {"delta": {"content": text} if text else {}}


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The tokens and their alternatives."""
    listed = [{**_alternative(token), "top_logprobs": [_alternative(other) for other in token.top]} for token in tokens]
    return {"content": listed, "refusal": None}


def _alternative(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}


def _head(generation: Generation, truncates: bool) -> dict[str, Any]:
    head = {
        "id": f"chatcmpl-{generation.id}",
        "object": "chat.completion.chunk" if generation.order.stream else "chat.completion",
        "created": int(time.time()),
        "model": generation.served.name,
        "system_fingerprint": generation.served.name_version,
    }
    return head | {"truncated": {"messages": generation.dropped}} if truncates else head
