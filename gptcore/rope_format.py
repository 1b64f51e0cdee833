"""Converts between `RopeScaling` and config.json's keys for the rotary embedding.

In: the dict of config.json. Out: ModelConfig's fields `rope_theta` and `rope_scaling`; and back.
"""

import math
import re
from dataclasses import replace
from typing import Any

from gptcore.config import ROPE_KINDS, ModelConfig, RopeScaling
from gptcore.errors import ConfigError, PackageError, did_you_mean, excerpt

ROPE_THETA = 10000.0
ROPE_KEYS = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
}
"""RopeScaling's fields -> config.json's keys."""
ROPE_USES = {
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_context", "attention_factor", "beta_fast", "beta_slow", "truncate"),
}
"""The fields that each kind of scaling uses."""


def published_rope(c: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` as `transformers` writes them for this network."""
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    used = {ROPE_KEYS[field]: getattr(c.rope_scaling, field) for field in ROPE_USES[c.rope_scaling.kind]}
    return {"rope_type": c.rope_scaling.kind, "rope_theta": c.rope_theta, **used}


def rope_fields(raw: dict[str, Any], context_length: Any) -> dict[str, Any]:
    """The base wavelength and the scaling, from wherever transformers reads them. Raises PackageError for other kinds.

    transformers reads rope_scaling first, then rope_parameters.
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise PackageError(f"{key} is {excerpt(rope)}; expected an object with rope_type, or null")
        nested = next((name for name, value in (rope or {}).items() if isinstance(value, dict)), None)
        if nested is not None:
            raise PackageError(f"{key} has {excerpt(nested)}, one setting per kind of layer; expected one for all")
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    fields = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", ROPE_THETA))}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PackageError(f"partial_rotary_factor is {excerpt(rope['partial_rotary_factor'])}; only 1.0 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return fields
    if kind not in ROPE_KINDS:
        known = ("default", *ROPE_KINDS)
        raise PackageError(
            f"rope_type is {excerpt(kind)} in {key}; expected one of {', '.join(known)}."
            f"{did_you_mean(kind, known) if isinstance(kind, str) else ''}"
        )
    return fields | {"rope_scaling": _rope_scaling(kind, rope, key, raw, context_length)}


def _rope_scaling(kind: str, rope: dict[str, Any], key: str, raw: dict[str, Any], context_length: Any) -> RopeScaling:
    """The scaling that `rope` describes, with transformers' defaults."""
    given = {field: rope[ROPE_KEYS[field]] for field in ROPE_USES[kind] if rope.get(ROPE_KEYS[field]) is not None}
    if "original_context" in ROPE_USES[kind]:
        given.setdefault("original_context", context_length)
        given["original_context"] = raw.get("original_max_position_embeddings", given["original_context"])
    required = [field for field in ROPE_USES[kind] if kind != "yarn" or field == "factor"]
    missing = next((ROPE_KEYS[field] for field in required if field not in given), None)
    if missing is not None:
        raise PackageError(f"{key} lacks {missing}, which rope_type {kind!r} needs")
    try:
        scaling = RopeScaling(kind, **{"original_context": 1, **given})
        if kind == "yarn" and "attention_factor" not in given:
            scaling = replace(scaling, attention_factor=_yarn_attention(scaling.factor, rope, key))
    except ConfigError as error:
        ours = re.compile(rf"\b({'|'.join(ROPE_KEYS)})\b")
        raise PackageError(f"{ours.sub(lambda found: ROPE_KEYS[found[1]], str(error))}, in {key}") from error
    return scaling


def _yarn_attention(factor: float, rope: dict[str, Any], key: str) -> float:
    """The attention factor that YaRN's paper recommends, or DeepSeek's ratio of two such."""
    shares = []
    for name in ("mscale", "mscale_all_dim"):
        value = rope.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < 1e6):
            raise PackageError(f"{name} is {excerpt(value)} in {key}; expected a number")
        shares.append(value)

    def recommended(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = shares
    return recommended(above) / recommended(below) if above and below else recommended(1.0)
