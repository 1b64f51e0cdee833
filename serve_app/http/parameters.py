"""The sampling parameters as a client may send them: gptcore's table as pydantic fields, with the service's own limits.

The request bodies of `serve_app.http.schemas` are built from them, and so are the commands and flags of
`serve_app.chat`. This module imports pydantic and no engine, so a client of the service stays light.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from gptcore.parameters import SAMPLING

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
]


def sampling_field(name: str, **changes: Any) -> Any:
    """The pydantic field of a sampling parameter: its default, help and bounds, with `changes` to any of them."""
    parameter = SAMPLING[name]
    bounds = {} if parameter.several else {"ge": parameter.least, "gt": parameter.above, "le": parameter.most}
    given = {"default": parameter.default, "description": parameter.help} | bounds | changes
    return Field(**{key: value for key, value in given.items() if value is not None or key == "default"})


def _to_integers(value: Any, depth: int = 2) -> Any:
    """JSON has one kind of number: a client may write 10 as 10.0, also in a list or a list of lists."""
    if depth and isinstance(value, list):
        return [_to_integers(part, depth - 1) for part in value] if {float, list} & set(map(type, value)) else value
    return int(value) if type(value) is float and abs(value) <= INT64 and value.is_integer() else value


class Body(BaseModel):
    """The body of any request: strict types, no unknown fields, `null` for "not given", and 10.0 for 10."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: _to_integers(value) for name, value in data.items() if value is not None}


class SamplingFields(Body):
    """How the next token is chosen and which tokens end the text."""

    temperature: float = sampling_field("temperature")
    # The bounds come first: AfterValidator would turn -2 into 0.
    top_k: Annotated[int, Field(ge=-1, le=INT32), AfterValidator(lambda k: max(k, 0))] = sampling_field(
        "top_k", ge=None, description=f"{SAMPLING['top_k'].help} -1 is the same as 0."
    )
    top_p: float = sampling_field("top_p")
    min_p: float = sampling_field("min_p")
    repetition_penalty: float = sampling_field("repetition_penalty", gt=None, ge=0.01, le=100)
    presence_penalty: float = sampling_field("presence_penalty")
    frequency_penalty: float = sampling_field("frequency_penalty")
    seed: int | None = sampling_field("seed", ge=-INT64 - 1, le=INT64)
    stop: Stop | None = sampling_field("stop", default=None)
    stop_token_ids: TokenIds = sampling_field("stop_token_ids", default=[], max_length=STOP_IDS)
    ignore_eos: bool = sampling_field("ignore_eos")


class Parameters(SamplingFields):
    """What every native route takes."""

    max_new_tokens: int = sampling_field("max_new_tokens")
