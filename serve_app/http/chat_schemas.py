"""Body and replies of `POST /v1/chat/completions`, as OpenAI's clients send and read them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from gptcore.parameters import SAMPLING, SamplingParams
from serve_app.errors import ApiError
from serve_app.generation.conversation import Conversation
from serve_app.http.parameters import INT32, Body, SamplingFields
from serve_app.http.reply_schemas import FinishReason, Usage
from serve_app.http.schemas import Choices, Stream, StreamOptions, check_usage_option, sampling_params
from serve_app.http.unsupported import drop_unsupported

RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
"""Variables of a template that a client gives by other fields, or not at all."""
MOST_MESSAGES = 10_000


class TextPart(Body):
    """A part of a message. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class ChatMessage(Body):
    """One message. OpenAI's role `developer` is `system` here, and the roles of tools are not supported."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="Passed to the model's template, which seldom uses it.")

    def message(self) -> dict[str, str]:
        """The message as templates have it, with the parts of a content on lines of their own."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


def conversation_of(messages: Sequence[ChatMessage], system_prompt: str = "") -> list[dict[str, str]]:
    """The messages as templates have them, behind the service's own system prompt if there is one.

    Raises ApiError for a system message beside that.
    """
    found = [message.message() for message in messages]
    if system_prompt:
        for place, message in enumerate(messages):
            if found[place]["role"] == "system":
                why = "this service sets the system prompt of every conversation; leave the message out"
                raise invalid("messages", f"messages[{place}].role is {message.role!r}: {why}")
        found.insert(0, {"role": "system", "content": system_prompt})
    return found


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`: OpenAI's fields, and this service's other sampling parameters."""

    model: str = Field(description="A model from GET /v1/models.")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        le=INT32,
        description="Most tokens of an answer; none: what the service and the context allow.",
    )
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="The older name of max_completion_tokens.")
    n: Choices = 1
    logprobs: bool = Field(False, description="Return each token's log-probability.")
    top_logprobs: int = Field(
        0, ge=0, le=SAMPLING["logprobs"].most, description="With logprobs: the likeliest tokens at each position."
    )
    stream: Stream = False
    stream_options: StreamOptions | None = None
    add_generation_prompt: bool = Field(True, description="Let the template begin the assistant's answer.")
    continue_final_message: bool = Field(
        False, description="Continue the last message, with add_generation_prompt false, instead of answering it."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Further variables of the model's template, such as Qwen3's enable_thinking."
    )
    truncate: Literal["oldest"] | None = Field(
        None,
        description="oldest: leave out the oldest turns of a conversation that has no room in the context beside an "
        "answer of the length asked for (a quarter of the context if none is); none: refuse one that is too long.",
    )
    user: str | None = Field(None, max_length=256, description="Accepted for OpenAI's clients; it has no effect.")

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, data: Any) -> Any:
        return drop_unsupported(data, cls.model_fields) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fit_together(self) -> "ChatRequest":
        check_usage_option(self.stream_options, self.stream)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid(
                "max_tokens",
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}"
                "; send one of them, or the same value",
            )
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", f"top_logprobs is {self.top_logprobs}, which needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message",
                "continue_final_message is true, which needs add_generation_prompt to be false",
            )
        for name in RESERVED:
            if name in self.chat_template_kwargs:
                raise invalid("chat_template_kwargs", f"chat_template_kwargs has {name!r}, which it cannot set")
        for number, message in enumerate(self.messages):
            if not message.message()["content"]:
                raise invalid("messages", f"messages.{number} has an empty content; expected a text")
        return self

    @property
    def length(self) -> int | None:
        """Most tokens of an answer, if the client has set it."""
        return self.max_completion_tokens or self.max_tokens

    def params(self) -> SamplingParams:
        """What the engine takes."""
        return sampling_params(self, self.length or INT32, self.top_logprobs if self.logprobs else None)

    def conversation(self, system_prompt: str = "") -> Conversation:
        """What the model's template takes. Raises ApiError for a system message beside the service's own."""
        return Conversation(
            conversation_of(self.messages, system_prompt),
            generate=self.add_generation_prompt,
            continues=self.continue_final_message,
            variables=self.chat_template_kwargs,
            truncate=self.truncate == "oldest",
        )


def invalid(param: str, message: str) -> ApiError:
    """The error for a field that does not fit."""
    return ApiError(400, message, param=param, code="invalid_value")


class ChatAlternative(BaseModel):
    """A token that could have been chosen at a position."""

    token: str = Field(description="The token's bytes as text; incomplete characters become U+FFFD.")
    logprob: float = Field(description="In nats, under the model at temperature 1.")
    bytes: list[int]


class ChatToken(ChatAlternative):
    """A token of the answer, and the likeliest tokens at its position."""

    top_logprobs: list[ChatAlternative]


class ChatLogprobs(BaseModel):
    """OpenAI's form; there are no refusals."""

    content: list[ChatToken]
    refusal: None = None


class Answer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Truncated(BaseModel):
    """What was left out of a conversation."""

    messages: int = Field(description="How many messages, the oldest; 0: none.")


class ChatCompletion(BaseModel):
    """Reply of `POST /v1/chat/completions`.

    An event of a stream is a `chat.completion.chunk`, whose choice has a `delta` in place of the `message`. There,
    `usage` is present only with `stream_options.include_usage`: null until a final event without choices.
    """

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Name and version of the model that answered.")
    choices: list[ChatChoice]
    usage: Usage
    truncated: Truncated | None = Field(None, description="Only with truncate, and in every event of a stream.")
