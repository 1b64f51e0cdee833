"""Request bodies as they are validated, and the documented replies and events.

An invalid field gets a 400 that names it. An unknown field is refused, and so is one of OpenAI's that this service
does not implement: nothing is ignored. `null` means the same as leaving a field out. The reply models are
documentation; the routes write the JSON themselves.

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

Each event has one choice. The joined texts of one index equal the text of the unstreamed reply. An event may contain
several tokens, or a token without text yet (half a character, or the possible start of a stop string). With `logprobs`
k, a choice's `logprobs` lists the event's tokens, each

    {"token_id": 318, "text": " is", "bytes": [32, 105, 115], "logprob": -0.71, "top": [
        {"token_id": 318, "text": " is", "bytes": [32, 105, 115], "logprob": -0.71}, … k of these, likeliest first]}

A stream that fails after it started ends with `data: {"error": {"message", "type", "param", "code"}}` and no `[DONE]`.
`POST /v1/completions` streams the same way in OpenAI's shape: see `Completion`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticKnownError

from gptcore.parameters import SAMPLING, SamplingParams
from gptcore.tokenizer import EOT
from serve_app.errors import ApiError
from serve_app.http.parameters import INT32, Body, Parameters, SamplingFields, TokenIds, sampling_field
from serve_app.http.unsupported import drop_unsupported


def _kind(value: Any) -> str:
    """Which form of a prompt `value` is, so that an error is about that form only."""
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
PromptText = Annotated[str, Field(description="The text to continue; if empty, the model begins a document.")]
ModelName = Annotated[str | None, Field(description="A model from GET /models; none: the default model.")]
Choices = Annotated[
    int,
    Field(
        ge=1,
        le=INT32,
        description="Continuations per prompt. Each gets its own seed, made from seed and its number.",
    ),
]
Echo = Annotated[
    bool,
    Field(description="Start the text with the prompt, and `logprobs` with the prompt's tokens."),
]
Stream = Annotated[bool, Field(description="Send the text as server-sent events while it is generated, then `[DONE]`.")]


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

    prompt: PromptText
    model: ModelName = None
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

    prompt: PromptText
    max_new_tokens: int = sampling_field("max_new_tokens", default=50)


class SentenceRequest(Sampling):
    """Body of `POST /complete-sentence`."""

    text: PromptText
    max_new_tokens: int = sampling_field("max_new_tokens", default=50)


def _require_bool(value: Any) -> Any:
    """Raises what Literal[False] does for another value: by itself it takes 0 too, which equals False in Python."""
    if not isinstance(value, bool):
        raise PydanticKnownError("literal_error", {"expected": "False"})
    return value


Off = Annotated[Literal[False], BeforeValidator(_require_bool)]
"""A switch of OpenAI's that this service does not have: false alone is accepted."""


class StreamOptions(Body):
    """`stream_options` of OpenAI's API."""

    include_usage: bool = Field(False, description="Send a final event with the usage; in earlier events it is null.")
    include_obfuscation: Off = Field(False, description="Not supported: events are not padded.")
    continuous_usage_stats: Off = Field(False, description="Not supported: usage is sent once, at the end.")


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`: OpenAI's fields, and this service's other sampling parameters."""

    model: str = Field(description="A model from GET /v1/models.")
    prompt: Prompt | None = Field(
        None, description="Text, token ids, or a list of either; none or empty: the model begins a document."
    )
    max_tokens: int = Field(
        16,
        ge=0,
        description="Most tokens to generate; 0 together with echo: return the prompt only. "
        "The service may set a lower limit.",
    )
    n: Choices = 1
    best_of: int | None = Field(None, description="1 or the value of n; choosing among candidates is not supported.")
    echo: Echo = False
    logprobs: Logprobs = None
    stream: Stream = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Accepted for OpenAI's clients; it has no effect.")

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
            message = "stream_options has include_usage, which needs stream to be true; other replies include the usage"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        _check_length("max_tokens", self.max_tokens, self.echo)
        return self

    def params(self) -> SamplingParams:
        """What the engine takes."""
        return _params(self, self.max_tokens, self.logprobs)

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The prompts as a list; an empty one begins a document."""
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
    Field(description="stop: end of text, stop string or stop token; length: length limit reached; null: unfinished."),
]


class Alternative(BaseModel):
    """A token that could have been chosen at a position."""

    token_id: int
    text: str = Field(description="The token's bytes as text; incomplete characters become U+FFFD.")
    bytes: list[int]
    logprob: float | None = Field(
        description="In nats, under the model at temperature 1; null for a prompt's first token."
    )


class Token(Alternative):
    """A token of the text, and the likeliest tokens at its position."""

    top: list[Alternative]


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class Usage(BaseModel):
    """Token counts. A prompt counts once, however many continuations it has."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Generated tokens, including the end-of-text token.")
    total_tokens: int
    prompt_tokens_details: CachedTokens


class GenerateChoice(BaseModel):
    """One continuation, or an event's part of it."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: list[Token] | None


class GenerateReply(BaseModel):
    """Reply of `POST /generate`; in a stream, only the last event has `usage`."""

    id: str
    model: str
    version: str
    seed: int = Field(description="The seed used; send it to get the same text again.")
    choices: list[GenerateChoice]
    usage: Usage


class GeneratedText(BaseModel):
    """Reply of `POST /generate/{model}`."""

    generated_text: str = Field(description="The prompt and its continuation.")


class CompletedSentence(BaseModel):
    """Reply of `POST /complete-sentence`."""

    completed_sentence: str = Field(description="The text and its continuation.")


EVENT_STREAM = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "description": "Part of the reply as JSON, an error, or [DONE] at the end.",
                }
            },
            "required": ["data"],
        }
    }
}
"""The `content` of a streamed reply in the OpenAPI document."""


class CompletionLogprobs(BaseModel):
    """OpenAI's legacy form: four lists with one entry per token, including the token that ended the text.

    A token with incomplete characters is written as `bytes:\\xe2\\x80`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="The token's start in the choice's text, in characters.")


class CompletionChoice(BaseModel):
    """One continuation, or an event's part of it."""

    index: int = Field(description="The j-th continuation of the i-th prompt has index i * n + j.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Reply of `POST /v1/completions`, and each event of its stream.

    In a stream, `usage` is present only with `stream_options.include_usage`: null until a final event without choices.
    """

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Name and version of the model that answered.")
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model in OpenAI's form; GET /models has more."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When it was loaded, in seconds since 1970; 0 if it is not loaded.")
    owned_by: str = Field(description="Always gpt-foundry.")


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeRequest(Body):
    """Body of `POST /tokenize`, in vLLM's form."""

    prompt: str = Field(description="The text.")
    model: ModelName = None
    add_special_tokens: bool = Field(True, description="No effect: these tokenizers add no special tokens.")
    return_token_strs: bool = Field(False, description="Also return the tokens as spelled in the vocabulary.")


class Tokenized(BaseModel):
    """Reply of `POST /tokenize`."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="The model's context length, in tokens.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`, in vLLM's form."""

    tokens: TokenIds = Field(description="Token ids of the model's tokenizer.")
    model: ModelName = None


class Detokenized(BaseModel):
    """Reply of `POST /detokenize`."""

    prompt: str = Field(description="The text; invalid UTF-8 becomes U+FFFD.")


class TokenizerInfo(BaseModel):
    """Reply of `GET /tokenizer_info`; the models have no chat format, so there is no chat template."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str = EOT
    eos_token: str = EOT
    add_prefix_space: bool = False
    clean_up_tokenization_spaces: bool = False
    model_max_length: int = Field(description="The model's context length, in tokens.")
    chat_template: None = None
