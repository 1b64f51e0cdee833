"""The service's own route, `POST /generate`, with a JSON reply or server-sent events (see `serve_app.http.schemas`).

Every reply contains the seed and the model's version, which reproduce the text.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from gptcore.engine import TokenLogprob, Update
from serve_app.generation.order import Order
from serve_app.generation.replies import GenerationResponse, SequenceResult, as_events, as_json, to_json
from serve_app.generation.stream import Generation, generating
from serve_app.http.schemas import GenerateReply, GenerateRequest
from serve_app.state import AppState


def router(state: AppState) -> APIRouter:
    """The route `/generate`."""
    routes = APIRouter(tags=["native"])
    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @routes.post(
        "/generate",
        response_model=None,
        responses={200: {"model": GenerateReply, "content": events}},
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
        )
        write = as_events(NativeEvents) if body.stream else as_json(_reply)
        return GenerationResponse(generating(state, request.state.request_id, order), write)

    return routes


def token_json(token: TokenLogprob) -> dict[str, Any]:
    """A token and its alternatives in the native form."""
    return {**_alternative(token), "top": [_alternative(other) for other in token.top]}


def _alternative(token: TokenLogprob) -> dict[str, Any]:
    return {"token_id": token.token_id, "text": token.text, "bytes": token.bytes, "logprob": token.logprob}


def _head(generation: Generation) -> dict[str, Any]:
    served = generation.served
    return {
        "id": f"gen-{generation.id}",
        "model": served.name,
        "version": served.version,
        "seed": generation.seed,
    }


def _reply(generation: Generation, choices: list[SequenceResult]) -> dict[str, Any]:
    asked = generation.order.params.logprobs is not None
    return {
        **_head(generation),
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "logprobs": [token_json(token) for token in choice.logprobs] if asked else None,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": generation.usage(),
    }


class NativeEvents:
    """The events of a stream. The part that all events share is encoded once."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._asked = generation.order.params.logprobs is not None
        self._head = to_json({**_head(generation), "choices": []})[:-2]

    def update(self, index: int, update: Update) -> str:
        """The event for one update; "" if it has nothing new."""
        tokens = update.prompt_logprobs + update.logprobs
        if not (update.text or tokens or update.finish_reason):
            return ""
        logprobs = to_json([token_json(token) for token in tokens]) if self._asked else "null"
        reason = f'"{update.finish_reason}"' if update.finish_reason else "null"
        text = to_json(update.text)
        return f'{self._head}{{"index":{index},"text":{text},"finish_reason":{reason},"logprobs":{logprobs}}}]}}'

    def last(self) -> str:
        """The event with the usage."""
        return f'{self._head}],"usage":{to_json(self._generation.usage())}}}'
