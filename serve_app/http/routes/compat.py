"""The routes of this project's predecessors, for their clients.

`POST /generate/{model}` takes {"prompt"} and returns {"generated_text"}; `POST /complete-sentence` takes {"text"} and
returns {"completed_sentence"}. Both texts start with the input, as they did there. The sampling parameters of
`POST /generate` work too.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from serve_app.generation.order import Order
from serve_app.generation.replies import GenerationResponse, SequenceResult, Write, as_json
from serve_app.generation.stream import Generation, generating
from serve_app.http.reply_schemas import CompletedSentence, GeneratedText
from serve_app.http.schemas import PromptRequest, Sampling, SentenceRequest
from serve_app.state import AppState

CUSTOM = "custom"


def router(state: AppState) -> APIRouter:
    """The routes `/generate/{model}` and `/complete-sentence`."""
    routes = APIRouter(tags=["compatible with the predecessors"])

    @routes.post(
        "/generate/{model}",
        response_model=None,
        responses={200: {"model": GeneratedText}},
        summary="Continue a text with the named model",
    )
    async def generate(request: Request, model: str, body: PromptRequest) -> Response:
        # The predecessors' own model was called custom: here the default model, unless a model has that name.
        named = None if model == CUSTOM and CUSTOM not in state.settings.sources else model
        order = _order(named, body.prompt, body)
        return GenerationResponse(generating(state, request.state.request_id, order), _only("generated_text"))

    @routes.post(
        "/complete-sentence",
        response_model=None,
        responses={200: {"model": CompletedSentence}},
        summary="Continue a text",
    )
    async def complete_sentence(request: Request, body: SentenceRequest) -> Response:
        order = _order(None, body.text, body)
        return GenerationResponse(generating(state, request.state.request_id, order), _only("completed_sentence"))

    return routes


def _order(model: str | None, prompt: str, body: Sampling) -> Order:
    default_length = "max_new_tokens" not in body.model_fields_set
    return Order(model=model, prompts=[prompt], params=body.params(), echo=True, default_length=default_length)


def _only(field: str) -> Write:
    """A reply with one field: the text."""

    def render(generation: Generation, choices: list[SequenceResult]) -> dict[str, Any]:
        return {field: choices[0].text}

    return as_json(render)
