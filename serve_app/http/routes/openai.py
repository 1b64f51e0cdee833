"""OpenAI's completions API, for its official clients: `/v1/completions` and `/v1/models`.

`system_fingerprint` is the model's version. Unsupported parameters of OpenAI's API are refused by name, never ignored.
"""

import codecs
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from gptcore.engine import TokenLogprob
from serve_app.generation.order import Order
from serve_app.generation.replies import Form, GenerationResponse, as_choices, as_events
from serve_app.generation.stream import Generation, generating
from serve_app.http.reply_schemas import EVENT_STREAM, Completion, ModelCard, ModelList
from serve_app.http.schemas import CompletionRequest
from serve_app.models.catalog import ModelStatus
from serve_app.state import AppState

OWNER = "gpt-foundry"


def router(state: AppState) -> APIRouter:
    """The routes `/v1/completions`, `/v1/models` and `/v1/models/{model}`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post(
        "/completions",
        response_model=None,
        responses={200: {"model": Completion, "content": EVENT_STREAM}},
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
            add_special_tokens=body.add_special_tokens,
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        form = Form(_head, lambda: LegacyLogprobs().convert, last_usage=usage, null_usage=usage)
        write = as_events(form) if body.stream else as_choices(form)
        return GenerationResponse(generating(state, request.state.request_id, order), write)

    @routes.get("/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[_card(status) for status in state.models.describe()])

    @routes.get("/models/{model:path}", summary="One model")
    async def model(model: str) -> ModelCard:
        return _card(state.models.status(model))

    return routes


def _card(status: ModelStatus) -> ModelCard:
    loaded = datetime.fromisoformat(status.loaded_at) if status.loaded_at else None
    created = int(loaded.timestamp()) if loaded else 0
    able: list[Literal["completion", "chat"]] = ["completion", "chat"] if status.chat else ["completion"]
    known = None if status.chat is None else able
    return ModelCard(id=status.name, object="model", created=created, owned_by=OWNER, capabilities=known)


class LegacyLogprobs:
    """Converts one choice's tokens to OpenAI's legacy form; counts characters for `text_offset` across events."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def convert(self, tokens: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
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
        "system_fingerprint": generation.served.name_version,
    }
