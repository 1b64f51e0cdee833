"""What the generating routes take and give: request bodies as they are checked, replies and events as documented.

In comes JSON, out comes a body whose every field has the right type and range, or a 400 that names the field. A field
that is not known is refused, and so is one of OpenAI's that this service does not implement: nothing is ignored.
`null` says the same as leaving a field out. The replies' models describe; the routes write the JSON themselves.

Server-sent events of `POST /generate` with `"stream": true` are lines `data: {json}`, an empty line after each:

    data: {"id": "gen-…", "model": "gpt", "version": "7", "seed": 42, "choices": [
             {"index": 0, "text": " brown fox", "finish_reason": null, "logprobs": null}]}
    …
    data: {"id": "gen-…", "model": "gpt", "version": "7", "seed": 42, "choices": [
             {"index": 0, "text": "", "finish_reason": "length", "logprobs": null}]}
    data: {"id": "gen-…", "model": "gpt", "version": "7", "seed": 42, "choices": [], "usage": {
             "prompt_tokens": 4, "completion_tokens": 128, "total_tokens": 132,
             "prompt_tokens_details": {"cached_tokens": 0}}}
    data: [DONE]

An event has one choice; the texts of one index, joined, are the text of the reply that is not streamed. An event
may bring several tokens, or a token and no text yet (half a character, or what might begin a stop string). With
`logprobs` k, a choice's `logprobs` is the list of the tokens that came with the event, each

    {"token_id": 318, "text": " is", "bytes": [32, 105, 115], "logprob": -0.71, "top": [
        {"token_id": 318, "text": " is", "bytes": [32, 105, 115], "logprob": -0.71}, … k of these, likeliest first]}

A stream that fails after it began ends with `data: {"error": {"message", "type", "param", "code"}}` and no `[DONE]`.
`POST /v1/completions` streams the same way in OpenAI's shape: see `Completion`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from gptcore.sampling import SamplingParams
from serve_app.errors import ApiError
from serve_app.parameters import (
    INT32,
    Body,
    FrequencyPenalty,
    IgnoreEos,
    MinP,
    Parameters,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TokenId,
    TopK,
    TopP,
)

# Fail fast: one fault per list, not one per element of a megabyte.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _kind(value: Any) -> str:
    """Which of a union's forms `value` is meant to be, so that a fault is told of that form alone."""
    if not isinstance(value, list):
        return "text"
    match value[:1]:
        case [int()]:
            return "ids"
        case [list()]:
            return "lists of ids"
    return "texts"


Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(fail_fast=True, min_length=1), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1), Tag("lists of ids")],
    Discriminator(_kind),
]
Choices = Annotated[
    int,
    Field(
        ge=1,
        le=INT32,
        description="Continuations of each prompt. Each has a seed of its own, made of seed and its number.",
    ),
]
Echo = Annotated[
    bool,
    Field(description="Begin the text with the prompt, and `logprobs` with the prompt's tokens."),
]
Stream = Annotated[bool, Field(description="Send server-sent events as the text comes, `[DONE]` as the last.")]


class Sampling(Parameters):
    """How the next token is chosen and when to stop: what every native route takes."""

    def params(self, logprobs: int | None = None) -> SamplingParams:
        """As the engine takes them."""
        return _params(self, self.max_new_tokens, logprobs)


class GenerateRequest(Sampling):
    """Body of `POST /generate`."""

    prompt: Text = Field(description="The text to continue.")
    model: str | None = Field(None, description="A model of GET /models; none: the service's first.")
    n: Choices = 1
    echo: Echo = False
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Report each token's log-probability and those of the k likeliest; none: do not.",
    )
    stream: Stream = False


class PromptRequest(Sampling):
    """Body of `POST /generate/{model}`."""

    prompt: Text = Field(description="The text to continue.")
    max_new_tokens: int = Field(50, ge=1, description="Tokens to generate at most.")


class SentenceRequest(Sampling):
    """Body of `POST /complete-sentence`."""

    text: Text = Field(description="The beginning of a text.")
    max_new_tokens: int = Field(50, ge=1, description="Tokens to generate at most.")


class StreamOptions(Body):
    """`stream_options` of OpenAI's API."""

    include_usage: bool = Field(False, description="Send one more event with the usage; until then it is null.")
    include_obfuscation: Literal[False] = Field(False, description="Events are not padded.")


NEUTRAL: dict[str, Any] = {"suffix": "", "logit_bias": {}}
"""What clients send of the unsupported that asks for nothing."""
UNSUPPORTED = {
    "suffix": "text is continued at its end only",
    "logit_bias": "the logits cannot be biased token by token; see temperature, the penalties and stop_token_ids",
    "messages": "this is the completions route and these models have no chat format; send a prompt",
    "tools": "these models call no tools",
    "functions": "these models call no functions",
    "response_format": "the text's form cannot be prescribed",
    "max_completion_tokens": "it belongs to OpenAI's chat route; here it is max_tokens",
    "max_new_tokens": "it belongs to POST /generate; here it is max_tokens",
    "top_logprobs": "it belongs to OpenAI's chat route; here logprobs is the number of alternatives",
}
"""Parameters that OpenAI's clients, or ours, know, and why this route does not take them."""


class CompletionRequest(Body):
    """Body of `POST /v1/completions`: OpenAI's fields, and after `user` our own."""

    model: str = Field(description="A model of GET /v1/models.")
    prompt: Prompt | None = Field(None, description="Text, token ids, or a list of either; none: begin a document.")
    max_tokens: int = Field(
        16,
        ge=0,
        description="Tokens to generate at most; 0 with echo: the prompt alone. The service has a bound.",
    )
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    n: Choices = 1
    best_of: int | None = Field(None, description="Only the value of n: there is no choosing among candidates.")
    echo: Echo = False
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="Report each token's log-probability and those of the k likeliest; none: do not.",
    )
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    seed: Seed = None
    stop: Stop | None = None
    stream: Stream = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Taken as OpenAI's clients send it; it changes nothing.")
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    stop_token_ids: StopTokenIds = []
    ignore_eos: IgnoreEos = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, reason in UNSUPPORTED.items():
            if data.get(name) not in (None, NEUTRAL.get(name)):
                raise ApiError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
        return {name: value for name, value in data.items() if name not in UNSUPPORTED}

    @model_validator(mode="after")
    def _fit_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            message = f"best_of is {self.best_of} and n is {self.n}: best_of is supported only where it equals n"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            message = "stream_options needs stream to be true"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens is 0: expected at least 1, or echo to be true"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return self

    def params(self) -> SamplingParams:
        """As the engine takes them: at least one token, of which a reply to `max_tokens` 0 shows nothing."""
        return _params(self, max(self.max_tokens, 1), self.logprobs)

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The prompts, one or several; no ids at all stand for "begin a document"."""
        match self.prompt:
            case None:
                return [[]]
            case str() as text:
                return [text]
            case [int(), *_] as ids:
                return [cast(list[int], ids)]
            case several:
                return cast(list[str] | list[list[int]], several)


def _params(body: Sampling | CompletionRequest, length: int, logprobs: int | None) -> SamplingParams:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingParams(
        max_new_tokens=length,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=body.seed,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


FinishReason = Annotated[
    Literal["stop", "length"] | None,
    Field(description="stop: end of text, or a stop string or token; length: as long as it may be; null: more comes."),
]


class Alternative(BaseModel):
    """A token that could stand at a place."""

    token_id: int
    text: str = Field(description="The token's bytes as text; bytes that are no whole characters become U+FFFD.")
    bytes: list[int]
    logprob: float | None = Field(
        description="Nats, of the model's distribution at temperature 1; null for a prompt's first token."
    )


class Token(Alternative):
    """A token of the text, and the likeliest ones at its place."""

    top: list[Alternative]


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that did not have to be computed anew.")


class Usage(BaseModel):
    """Tokens in and out. A prompt counts once, however many continuations it got."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Generated tokens, the end-of-text token included.")
    total_tokens: int
    prompt_tokens_details: CachedTokens


class GenerateChoice(BaseModel):
    """One continuation, or the part of it that an event brings."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: list[Token] | None


class GenerateReply(BaseModel):
    """Reply of `POST /generate`; as an event of its stream, `usage` comes with the last one alone."""

    id: str
    model: str
    version: str
    seed: int = Field(description="What gives the same text again.")
    choices: list[GenerateChoice]
    usage: Usage


class GeneratedText(BaseModel):
    """Reply of `POST /generate/{model}`."""

    generated_text: str = Field(description="The prompt and its continuation.")


class CompletedSentence(BaseModel):
    """Reply of `POST /complete-sentence`."""

    completed_sentence: str = Field(description="The text and its continuation.")


class CompletionLogprobs(BaseModel):
    """OpenAI's legacy form: four lists of one entry per token.

    A token that is no whole characters is written `bytes:\\xe2\\x80`. The token that ended the text is among them.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where the token begins in the choice's text, in characters.")


class CompletionChoice(BaseModel):
    """One continuation, or the part of it that an event brings."""

    index: int = Field(description="The j-th continuation of the i-th prompt has index i * n + j.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Reply of `POST /v1/completions`, and each event of its stream.

    Of a stream, `usage` is there only with `stream_options.include_usage`: null, until a last event without choices.
    """

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Name and version of the model that answered.")
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model, in OpenAI's terms; GET /models says more."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When it was loaded, in seconds since 1970; 0 if it has not been.")
    owned_by: str


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]
