"""`POST /v1/feedback`: a vote on an answer of `/v1/chat/completions`, kept if the service has a place for votes.

The client sends the conversation with the answer. So no text is kept that nobody has voted on, and any replica can take
the vote, also after a restart.
"""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from gptcore.errors import QueueFull
from serve_app.errors import RETRY_LATER, ApiError
from serve_app.generation.order import template_of
from serve_app.http.chat_schemas import MOST_MESSAGES, ChatMessage, conversation_of, invalid
from serve_app.http.parameters import Body
from serve_app.state import AppState

log = logging.getLogger(__name__)

MARK = r"^[!-~]+$"


class FeedbackRequest(Body):
    """Body of `POST /v1/feedback`."""

    id: str = Field(pattern=MARK, max_length=256, description="The id of the reply that had the answer.")
    model: str = Field(description="The model that answered.")
    messages: list[ChatMessage] = Field(
        min_length=2, max_length=MOST_MESSAGES, description="The conversation; its last message is the answer."
    )
    score: Literal[1, -1] = Field(description="1: a good answer; -1: a bad one.")
    better: str | None = Field(None, min_length=1, description="A better answer, to learn instead.")
    system_fingerprint: str | None = Field(
        None, pattern=MARK, max_length=256, description="From the reply: the version that answered."
    )

    @model_validator(mode="after")
    def _is_an_answer(self) -> "FeedbackRequest":
        last = len(self.messages) - 1
        if self.messages[last].role != "assistant":
            found = self.messages[last].role
            raise invalid("messages", f"messages[{last}].role is {found!r}; expected 'assistant': the answer is last")
        for place, message in enumerate(self.messages):
            if not message.message()["content"].strip():
                raise invalid("messages", f"messages[{place}] has an empty content; expected a text")
        if self.better is not None and not self.better.strip():
            raise invalid("better", "better is an empty text; expected an answer, or no such field")
        return self

    def training_messages(self, system_prompt: str = "") -> list[dict[str, Any]]:
        """The conversation as training reads it: only an answer that is good, or the better one, is to be learned.

        Raises ApiError for a system message beside the service's own.
        """
        found = conversation_of(self.messages, system_prompt)
        *before, answer = ({"role": message["role"], "content": message["content"]} for message in found)
        earlier = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in before]
        if self.better is not None:
            return [*earlier, answer | {"content": self.better}]
        return [*earlier, answer | ({"weight": 0} if self.score < 0 else {})]


class Feedback(BaseModel):
    """Reply of `POST /v1/feedback`."""

    id: str
    object: Literal["feedback"] = "feedback"
    score: Literal[1, -1]


def router(state: AppState) -> APIRouter:
    """The route `/v1/feedback`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/feedback", summary="Vote on an answer")
    async def feedback(request: Request, body: FeedbackRequest) -> Feedback:
        if state.feedback is None:
            message = "this service keeps no feedback; it does if GPT_FEEDBACK is set to a folder or a URL"
            raise ApiError(404, message, code="feedback_off")
        messages = body.training_messages(state.settings.system_prompt)
        async with state.models.lease(body.model, request.state.request_id) as served:
            # A conversation that the template refuses would end a training run.
            await asyncio.to_thread(template_of(served).answers, messages)
        vote = {
            "messages": messages,
            "id": body.id,
            "score": body.score,
            "answer": body.messages[-1].message()["content"],
            "model": body.system_fingerprint or body.model,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            replaced = await state.feedback.keep(vote)
        except QueueFull:
            raise
        except Exception as error:  # clients of stores raise errors of many kinds
            log.error("a vote could not be written", exc_info=error)
            message = "the vote could not be written; the service's log has the reason"
            raise ApiError(503, message, code="feedback_unavailable", headers=RETRY_LATER) from error
        if replaced is None or replaced["score"] != body.score:
            # Only versions that are loaded become labels, since clients could send any number of names.
            known = next((one for one in state.models.loaded() if one.name_version == body.system_fingerprint), None)
            state.metrics.feedback(*((known.name, known.version) if known else ("", "")), body.score)
        return Feedback(id=body.id, score=body.score)

    return routes
