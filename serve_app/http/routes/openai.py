"""OpenAI's completions API, for its official clients: `/v1/completions` and `/v1/models`.

`system_fingerprint` is the model's version. Unsupported parameters of OpenAI's API are refused by name, never ignored.
"""

import codecs
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from gptcore.engine import TokenLogprob, Update
from gptcore.errors import did_you_mean
from serve_app.errors import ApiError
from serve_app.generation.order import Order
from serve_app.generation.replies import GenerationResponse, SequenceResult, as_events, as_json, to_json
from serve_app.generation.stream import Generation, generating
from serve_app.http.schemas import Completion, CompletionRequest, ModelCard, ModelList
from serve_app.models.catalog import ModelStatus
from serve_app.state import AppState

OWNER = "gpt-foundry"


def router(state: AppState) -> APIRouter:
    """The routes `/v1/completions`, `/v1/models` and `/v1/models/{model}`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @routes.post(
        "/completions",
        response_model=None,
        responses={200: {"model": Completion, "content": events}},
        summary="Continue one or more texts",
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        order = Order(
            model=body.model,
            prompts=body.prompts(),
            params=body.params(),
            n=body.n,
            echo=body.echo,
            prompt_only=body.max_tokens == 0,
            length_field="max_tokens",
            default_length="max_tokens" not in body.model_fields_set,
            stream=body.stream,
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        write = as_events(lambda generation: CompletionEvents(generation, usage)) if body.stream else as_json(_reply)
        return GenerationResponse(generating(state, request.state.request_id, order), write)

    @routes.get("/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[_card(status) for status in state.models.describe()])

    @routes.get("/models/{model:path}", summary="One model")
    async def model(model: str) -> ModelCard:
        known = {status.name: status for status in state.models.describe()}
        if model not in known:
            message = f"there is no model {model!r}.{did_you_mean(model, known)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return _card(known[model])

    return routes


def _card(status: ModelStatus) -> ModelCard:
    loaded = datetime.fromisoformat(status.loaded_at) if status.loaded_at else None
    created = int(loaded.timestamp()) if loaded else 0
    return ModelCard(id=status.name, object="model", created=created, owned_by=OWNER)


class LegacyLogprobs:
    """Converts one choice's tokens to OpenAI's legacy form; counts characters for `text_offset` across events."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def form(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The four lists."""
        offsets = [self._follow(bytes(token.bytes)) for token in tokens]
        return {
            "tokens": [spelled(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # A prompt's first token has no alternatives, which OpenAI marks with null.
            "top_logprobs": [
                None if token.logprob is None else {spelled(other): other.logprob for other in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _follow(self, content: bytes) -> int:
        """The offset of the character that contains the token's first byte; it may start in an earlier token."""
        if not content:
            return self._offset
        first = self._decoder.decode(content[:1])
        begun, _ = self._decoder.getstate()
        start = self._offset + len(first) - (0 if begun else 1)  # len > 1: an earlier character was incomplete
        self._offset += len(first) + len(self._decoder.decode(content[1:]))
        return start


def spelled(token: TokenLogprob) -> str:
    """The token's text, or `bytes:\\xe2\\x80` for incomplete characters, so that no two tokens look the same."""
    try:
        return bytes(token.bytes).decode("utf-8") or token.text
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": f"cmpl-{generation.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": generation.served.name,
        "system_fingerprint": generation.model_version,
    }


def _reply(generation: Generation, choices: list[SequenceResult]) -> dict[str, Any]:
    asked = generation.order.params.logprobs is not None
    return {
        **_head(generation),
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": LegacyLogprobs().form(choice.logprobs) if asked else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": generation.usage(),
    }


class CompletionEvents:
    """The events of a stream. The part that all events share is encoded once."""

    def __init__(self, generation: Generation, with_usage: bool) -> None:
        self._generation = generation
        self._with_usage = with_usage
        self._head = to_json({**_head(generation), "choices": []})[:-2]
        self._tail = '],"usage":null}' if with_usage else "]}"
        asked = generation.order.params.logprobs is not None
        self._logprobs = [LegacyLogprobs() for _ in range(generation.order.size)] if asked else None

    def update(self, index: int, update: Update) -> str:
        """The event for one update; "" if it has nothing new."""
        tokens = update.prompt_logprobs + update.logprobs
        if not (update.text or tokens or update.finish_reason):
            return ""
        logprobs = to_json(self._logprobs[index].form(tokens)) if self._logprobs else "null"
        reason = f'"{update.finish_reason}"' if update.finish_reason else "null"
        text = to_json(update.text)
        return (
            f'{self._head}{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":{reason}}}{self._tail}'
        )

    def last(self) -> str:
        """The event with the usage, if requested."""
        return f'{self._head}],"usage":{to_json(self._generation.usage())}}}' if self._with_usage else ""
