"""The routes of the projects that this one succeeds, as their clients know them.

`POST /generate/{model}` takes {"prompt"} and gives {"generated_text"}; `POST /complete-sentence` takes {"text"} and
gives {"completed_sentence"}. Both texts begin with what was sent, as they did there. Sampling parameters of
`POST /generate` are taken too.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from serve_app.generation.order import Order
from serve_app.generation.replies import GenerationResponse, SequenceResult, Write, as_json
from serve_app.generation.stream import Generation, generating
from serve_app.http.schemas import CompletedSentence, GeneratedText, PromptRequest, Sampling, SentenceRequest
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
        # Their own model was called custom; here that is the one this service serves, unless a model has the name.
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
    """A reply of one field: the text."""

    def render(generation: Generation, choices: list[SequenceResult]) -> dict[str, Any]:
        return {field: choices[0].text}

    return as_json(render)
