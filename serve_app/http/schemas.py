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

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from gptcore.parameters import SAMPLING, SamplingParams
from gptcore.tokenizer import EOT
from serve_app.errors import ApiError
from serve_app.http.parameters import INT32, Body, Parameters, SamplingFields, TokenIds, sampling_field
from serve_app.http.unsupported import drop_unsupported


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
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("lists of ids")],
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


Logprobs = Annotated[
    Annotated[int, Field(ge=SAMPLING["logprobs"].least, le=SAMPLING["logprobs"].most)] | None,
    BeforeValidator(lambda value: None if value is False else value),
    Field(
        description=f"{SAMPLING['logprobs'].help} None or false: do not.",
        json_schema_extra=lambda schema: schema["anyOf"].append({"const": False}),
    ),
]


class Sampling(Parameters):
    """How the next token is chosen and when to stop: what every native route takes."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, data: Any) -> Any:
        return drop_unsupported(data, cls.model_fields) if isinstance(data, dict) else data

    def params(self, logprobs: int | None = None) -> SamplingParams:
        """What the engine takes."""
        return _params(self, self.max_new_tokens, logprobs)


class GenerateRequest(Sampling):
    """Body of `POST /generate`."""

    prompt: str = Field(description="The text to continue; an empty one: begin a document.")
    model: str | None = Field(None, description="A model of GET /models; none: the service's first.")
    max_new_tokens: int = sampling_field(
        "max_new_tokens",
        ge=0,
        description=f"{SAMPLING['max_new_tokens'].help} 0 together with echo: return the prompt only.",
    )
    n: Choices = 1
    echo: Echo = False
    logprobs: Logprobs = None
    stream: Stream = False

    @model_validator(mode="after")
    def _fit_together(self) -> "GenerateRequest":
        _check_length("max_new_tokens", self.max_new_tokens, self.echo)
        return self


class PromptRequest(Sampling):
    """Body of `POST /generate/{model}`."""

    prompt: str = Field(description="The text to continue; an empty one: begin a document.")
    max_new_tokens: int = sampling_field("max_new_tokens", default=50)


class SentenceRequest(Sampling):
    """Body of `POST /complete-sentence`."""

    text: str = Field(description="The beginning of a text; an empty one: begin a document.")
    max_new_tokens: int = sampling_field("max_new_tokens", default=50)


class StreamOptions(Body):
    """`stream_options` of OpenAI's API."""

    include_usage: bool = Field(False, description="Send one more event with the usage; until then it is null.")
    include_obfuscation: Literal[False] = Field(False, description="Events are not padded.")
    continuous_usage_stats: Literal[False] = Field(False, description="The usage comes once, at the end.")


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`: OpenAI's fields, and after `user` our own."""

    model: str = Field(description="A model of GET /v1/models.")
    prompt: Prompt | None = Field(
        None, description="Text, token ids, or a list of either; none, or an empty one: begin a document."
    )
    max_tokens: int = Field(
        16,
        ge=0,
        description="Tokens to generate at most; 0 with echo: the prompt alone. The service has a bound.",
    )
    n: Choices = 1
    best_of: int | None = Field(None, description="1, or the value of n: there is no choosing among candidates.")
    echo: Echo = False
    logprobs: Logprobs = None
    stream: Stream = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Taken as OpenAI's clients send it; it changes nothing.")

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, data: Any) -> Any:
        return drop_unsupported(data, cls.model_fields) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fit_together(self) -> "CompletionRequest":
        if self.best_of not in (None, 1, self.n):
            message = f"best_of is {self.best_of} and n is {self.n}: best_of is supported only as 1 or the value of n"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            message = "stream_options has include_usage, which needs stream to be true; else the reply has the usage"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        _check_length("max_tokens", self.max_tokens, self.echo)
        return self

    def params(self) -> SamplingParams:
        """What the engine takes."""
        return _params(self, self.max_tokens, self.logprobs)

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The prompts, one or several; no ids at all stand for "begin a document"."""
        match self.prompt:
            case None | []:
                return [[]]
            case str() as text:
                return [text]
            case [int(), *_] as ids:
                return [cast(list[int], ids)]
            case several:
                return cast(list[str] | list[list[int]], several)


def _check_length(name: str, length: int, echo: bool) -> None:
    if length == 0 and not echo:
        message = f"{name} is 0: expected at least 1, or echo to be true"
        raise ApiError(400, message, param=name, code="invalid_value")


def _params(body: SamplingFields, length: int, logprobs: int | None) -> SamplingParams:
    values = {name: getattr(body, name) for name in SamplingFields.model_fields}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    values |= {"stop": tuple(text for text in stop if text), "stop_token_ids": tuple(body.stop_token_ids)}
    # A length of 0 asks for the prompt alone, which SamplingParams cannot express.
    return SamplingParams(max_new_tokens=max(length, 1), logprobs=logprobs, **values)


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
    owned_by: str = Field(description="Who serves it: gpt-foundry.")


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeRequest(Body):
    """Body of `POST /tokenize`, as vLLM has it."""

    prompt: str = Field(description="The text.")
    model: str | None = Field(None, description="A model of GET /models; none: the service's first.")
    add_special_tokens: bool = Field(True, description="These tokenizers add none, so it changes nothing.")
    return_token_strs: bool = Field(False, description="Add the tokens as the tokenizer's vocabulary spells them.")


class Tokenized(BaseModel):
    """Reply of `POST /tokenize`."""

    count: int = Field(description="How many tokens the text has.")
    max_model_len: int = Field(description="The model's context, in tokens.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`, as vLLM has it."""

    tokens: TokenIds = Field(description="Token ids of the model.")
    model: str | None = Field(None, description="A model of GET /models; none: the service's first.")


class Detokenized(BaseModel):
    """Reply of `POST /detokenize`."""

    prompt: str = Field(description="The text; bytes that are no UTF-8 become U+FFFD.")


class TokenizerInfo(BaseModel):
    """Reply of `GET /tokenizer_info`; there is no chat template, since the models have no chat format."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str = EOT
    eos_token: str = EOT
    add_prefix_space: bool = False
    clean_up_tokenization_spaces: bool = False
    model_max_length: int = Field(description="The model's context, in tokens.")
    chat_template: None = None
