"""The sampling parameters that a client may send: their types, ranges, defaults and what each is for.

They are said here once. The request bodies of `serve_app.http.schemas` are made of them, and so are the commands and
flags of `serve_app.chat`. This module knows pydantic alone, so a client of the service need not import an engine.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

STOP_STRINGS, STOP_CHARACTERS, STOP_IDS = 16, 256, 64
"""Most stop strings, characters in one, and stop token ids of a request: each is looked for at every token."""
INT32, INT64 = 2**31 - 1, 2**63 - 1

TokenId = Annotated[int, Field(ge=0, le=INT32)]
# Fail fast: one fault per list, not one per element of a megabyte.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopString = Annotated[str, Field(max_length=STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(fail_fast=True, max_length=STOP_STRINGS), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
    Field(
        description="The text ends before the first of these strings, which is not part of it. "
        "An empty one stops nothing."
    ),
]
Seed = Annotated[
    int | None,
    Field(
        ge=-INT64 - 1,
        le=INT64,
        description="The same seed, prompt and parameters give the same text; none: one is drawn, and told.",
    ),
]
Temperature = Annotated[
    float, Field(ge=0, description="Divides the logits: 0 takes the likeliest token, below 1 is safer, above 1 wilder.")
]
TopK = Annotated[
    int,
    Field(ge=-1, le=INT32, description="Choose among the k likeliest tokens; 0, or -1: all."),
    AfterValidator(lambda k: max(k, 0)),
]
TopP = Annotated[
    float, Field(gt=0, le=1, description="Choose among the fewest likeliest tokens that hold this probability; 1: all.")
]
MinP = Annotated[
    float, Field(ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest; 0: none.")
]
RepetitionPenalty = Annotated[
    float, Field(ge=0.01, le=100, description="Above 1, tokens of prompt and text become less likely again; 1: off.")
]
PresencePenalty = Annotated[
    float, Field(ge=-2, le=2, description="Taken off the logit of each token that was generated before; 0: off.")
]
FrequencyPenalty = Annotated[
    float, Field(ge=-2, le=2, description="Taken off a token's logit once for each time it was generated; 0: off.")
]
StopTokenIds = Annotated[TokenIds, Field(max_length=STOP_IDS, description="The text ends at any of these tokens.")]
IgnoreEos = Annotated[bool, Field(description="Go on after the end-of-text token, until the length is reached.")]


def _whole(value: Any, depth: int = 2) -> Any:
    """JSON has one kind of number: a client may write 10 as 10.0, in a list or a list of lists too."""
    if depth and isinstance(value, list):
        return [_whole(part, depth - 1) for part in value] if {float, list} & set(map(type, value)) else value
    return int(value) if type(value) is float and abs(value) <= INT64 and value.is_integer() else value


class Body(BaseModel):
    """Any request's body: strict types, no unknown fields, `null` for "not given", and 10.0 for 10."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: _whole(value) for name, value in data.items() if value is not None}


class Parameters(Body):
    """How the next token is chosen and when to stop: what every native route takes."""

    max_new_tokens: int = Field(
        128,
        ge=1,
        description="Tokens to generate at most; fewer if the context is full. The service has a bound.",
    )
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    seed: Seed = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds = []
    ignore_eos: IgnoreEos = False
