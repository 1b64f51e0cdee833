"""The service's own route, `POST /generate`, with a JSON reply or server-sent events (see `serve_app.http.schemas`).

Every reply contains the seed and the model's version, which reproduce the text.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from gptcore.engine import TokenLogprob
from serve_app.generation.order import Order
from serve_app.generation.replies import Form, GenerationResponse, as_choices, as_events
from serve_app.generation.stream import Generation, generating
from serve_app.http.reply_schemas import EVENT_STREAM, GenerateReply
from serve_app.http.schemas import GenerateRequest
from serve_app.state import AppState


def router(state: AppState) -> APIRouter:
    """The route `/generate`."""
    routes = APIRouter(tags=["native"])

    @routes.post(
        "/generate",
        response_model=None,
        responses={200: {"model": GenerateReply, "content": EVENT_STREAM}},
        summary="Continue a text",
    )
    async def generate(request: Request, body: GenerateRequest) -> Response:
        order = Order(
            model=body.model,
            prompts=[body.prompt],
            params=body.params(body.logprobs),
            n=body.n,
            echo=body.echo,
            prompt_only=body.max_new_tokens == 0,
            default_length="max_new_tokens" not in body.model_fields_set,
            stream=body.stream,
            add_special_tokens=body.add_special_tokens,
        )
        write = as_events(FORM) if body.stream else as_choices(FORM)
        return GenerationResponse(generating(state, request.state.request_id, order), write)

    return routes


def _head(generation: Generation) -> dict[str, Any]:
    served = generation.served
    return {
        "id": f"gen-{generation.id}",
        "model": served.name,
        "version": served.version,
        "seed": generation.seed,
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The tokens and their alternatives."""
    return [{**_alternative(token), "top": [_alternative(other) for other in token.top]} for token in tokens]


def _alternative(token: TokenLogprob) -> dict[str, Any]:
    return {"token_id": token.token_id, "text": token.text, "bytes": token.bytes, "logprob": token.logprob}


FORM = Form(_head, lambda: _logprobs)
