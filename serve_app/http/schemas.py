"""Request bodies as they are validated.

An invalid field gets a 400 that names it. An unknown field is refused, and so is one of OpenAI's that this service
does not implement: nothing is ignored. `null` means the same as leaving a field out.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticKnownError

from gptcore.parameters import SAMPLING, SamplingParams
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
AddSpecialTokens = Annotated[
    bool,
    Field(description="Begin a text with the token that its tokenizer puts there: Llama's BOS, none for most."),
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
        return sampling_params(self, self.max_new_tokens, logprobs)


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
    add_special_tokens: AddSpecialTokens = True

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


def check_usage_option(options: StreamOptions | None, stream: bool) -> None:
    """Raises ApiError if the usage is asked for at the end of a reply that is not streamed."""
    if options is not None and options.include_usage and not stream:
        message = "stream_options has include_usage, which needs stream to be true; other replies include the usage"
        raise ApiError(400, message, param="stream_options", code="invalid_value")


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
    add_special_tokens: AddSpecialTokens = True
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
        check_usage_option(self.stream_options, self.stream)
        _check_length("max_tokens", self.max_tokens, self.echo)
        return self

    def params(self) -> SamplingParams:
        """What the engine takes."""
        return sampling_params(self, self.max_tokens, self.logprobs)

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


def sampling_params(body: SamplingFields, length: int, logprobs: int | None) -> SamplingParams:
    """What the engine takes, of a body with so long a continuation."""
    values = {name: getattr(body, name) for name in SamplingFields.model_fields}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    values |= {"stop": tuple(text for text in stop if text), "stop_token_ids": tuple(body.stop_token_ids)}
    # A length of 0 asks for the prompt alone, which SamplingParams cannot express.
    return SamplingParams(max_new_tokens=max(length, 1), logprobs=logprobs, **values)


class TokenizeRequest(Body):
    """Body of `POST /tokenize`, in vLLM's form."""

    prompt: str = Field(description="The text.")
    model: ModelName = None
    add_special_tokens: AddSpecialTokens = True
    return_token_strs: bool = Field(False, description="Also return the tokens as spelled in the vocabulary.")


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`, in vLLM's form."""

    tokens: TokenIds = Field(description="Token ids of the model's tokenizer.")
    model: ModelName = None
