"""The replies and events as the OpenAPI document shows them. The routes write the JSON themselves.

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

from typing import Annotated, Literal

from pydantic import BaseModel, Field

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
    capabilities: list[Literal["completion", "chat"]] | None = Field(
        description="chat: /v1/chat/completions answers with it, as it has a chat template; null: not loaded.",
    )


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(BaseModel):
    """Reply of `POST /tokenize`."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="The model's context length, in tokens.")
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """Reply of `POST /detokenize`."""

    prompt: str = Field(description="The text; invalid UTF-8 becomes U+FFFD.")


class TokenizerInfo(BaseModel):
    """Reply of `GET /tokenizer_info`."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str
    eos_token: str
    add_prefix_space: bool = False
    clean_up_tokenization_spaces: bool = False
    model_max_length: int = Field(description="The model's context length, in tokens.")
    chat_template: str | None = Field(description="In Jinja; null: the model only continues text.")
