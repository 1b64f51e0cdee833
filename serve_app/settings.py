"""What a service is told: one frozen dataclass, and the ways to fill it.

In: the environment (`GPT_` and the setting's name in capitals) and, above it, what `serve run serve_app:build_app
key=value ...` or a Serve config's `args` say. Out: `ServeSettings`, in which every path is absolute, since replicas
run in another folder. A field's help and unit stand beside its default and are the only description there is:
`python -m serve_app.settings` prints the docs' table from them.
"""

import logging
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gptcore.config import setting
from gptcore.engine.settings import CHOICES, EngineSettings
from gptcore.errors import ConfigError, did_you_mean
from gptcore.home import default_tracking_uri, expanded
from serve_app.front.haproxy import BODY_SECONDS

log = logging.getLogger(__name__)

PREFIX = "GPT_"
LOG_LEVELS = ("debug", "info", "warning", "error")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""It goes into a header."""
NAME_FORM = "1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit"
MOST_SLOTS = 64
"""The most that an engine chooses by itself."""
ALL = "all"


@dataclass(frozen=True)
class Canary:
    """The share of the default model's requests that another source answers."""

    source: str
    share: float


@dataclass(frozen=True)
class ServeSettings:
    """Everything one service is told. Raises ConfigError for a value that does not fit."""

    # Models
    model: str = setting(
        "",
        "The model that answers where a request names none: a name from `models`, or a source of its own (a folder, "
        "models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, hf:ORG/NAME or s3://…). Default: the first of "
        "`models`, else models:/gpt@champion.",
    )
    models: tuple[str, ...] = setting((), "The models served, as NAME=SOURCE, comma-separated.")
    eager: tuple[str, ...] = setting(
        (), f"Models to load at start, or {ALL}; others load on first use. The default model always loads at start."
    )
    canary: str = setting(
        "",
        "SOURCE:SHARE or NAME:SHARE, such as models:/gpt@candidate:0.1: what answers this share of the default "
        "model's requests, chosen by a hash of the request's id.",
    )
    tracking_uri: str = setting(
        "", "MLflow, for models:/ and runs:/. Default: $MLFLOW_TRACKING_URI, else the embedded database."
    )
    load_seconds: float = setting(
        600.0, "Longest time that a load may take, its download included; then it is given up.", "seconds"
    )
    poll_seconds: float = setting(5.0, "How often the registry is asked where an alias points.", "seconds")
    # Who may ask, and for how much
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={"help": "Keys, comma-separated, of which a request must bear one. Default: none is asked for."},
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Names, besides loopback's, by which requests may address the service (their Host header, without the port), "
        "or *. Default: any, but on loopback without keys only loopback's, since any page could ask otherwise.",
    )
    cors_origins: tuple[str, ...] = setting((), "Origins whose pages may call the service, or *. Default: none.")
    max_prompt_tokens: int = setting(0, "Longest prompt; 0: what the model's context holds.", "tokens")
    max_new_tokens: int = setting(4096, "Most tokens that a request may ask for.", "tokens")
    max_sequences: int = setting(64, "Most sequences that a request may ask for: its prompts times n.", "sequences")
    max_body_bytes: int = setting(1_000_000, "Largest body of a request.", "bytes")
    body_timeout_s: float = setting(
        BODY_SECONDS, "Longest time in which the body of a request may arrive; then it is answered 408.", "seconds"
    )
    request_timeout_s: float = setting(
        300.0, "Longest time that a request may take, its wait and its stream included.", "seconds"
    )
    stream_interval_ms: float = setting(
        40.0, "Least time between two pieces of a streamed text, after the first; 0: a piece for each token.", "ms"
    )
    # Engine
    slots: int = setting(
        0,
        "Sequences that a model decodes together; 0: as many as half the free memory holds, at most 16, or 64 on CUDA.",
        "sequences",
    )
    max_queue: int = setting(
        64, "Requests that may wait for a slot in a replica; one more is answered 503 with Retry-After.", "requests"
    )
    prefill_tokens: int = setting(256, "Prompt tokens computed per step beside the decodes.", "tokens")
    dtype: str = setting(
        "auto", "Precision: auto is bfloat16 where the hardware computes in it.", choices=CHOICES["dtype"]
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps; auto: a GPU if the replica has one.")
    backend: str = setting(
        "auto", "auto: the native kernels on a CPU that can build them, else torch.", choices=CHOICES["backend"]
    )
    threads: int = setting(
        0, "Threads that compute, per model; 0: num_cpus or, without, the machine's CPUs / max_replicas.", "threads"
    )
    compile: bool = setting(False, "Have torch.compile fuse the network: a slower start, faster steps.")
    prefix_cache: bool = setting(True, "Reuse what was computed for a prompt that begins alike.")
    # Replicas
    min_replicas: int = setting(1, "Fewest replicas; 0: none is kept while nobody asks.", "replicas")
    max_replicas: int = setting(1, "Most replicas.", "replicas")
    target_ongoing_requests: float = setting(
        8.0, "Requests in a replica, waiting or running, that scaling aims at.", "requests"
    )
    upscale_delay_s: float = setting(10.0, "How long there must be too many before a replica is added.", "seconds")
    downscale_delay_s: float = setting(120.0, "How long there must be too few before one is taken away.", "seconds")
    num_cpus: float = setting(
        0.0, "CPUs that Ray keeps for each replica; 0: none, so that a replica starts on a busy machine too.", "CPUs"
    )
    num_gpus: float = setting(0.0, "GPUs that Ray keeps for each replica.", "GPUs")
    drain_seconds: float = setting(30.0, "How long a replica that leaves may finish its requests.", "seconds")
    host: str = setting(
        "127.0.0.1", "Address to listen on, for whoever starts Serve; 0.0.0.0 answers other machines too."
    )
    port: int = setting(8000, "Port to listen on, for whoever starts Serve.")
    log_level: str = setting("info", "How much is logged.", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                expected = ", ".join(choices)
                raise _wrong(f.name, value, f"one of {expected}.{did_you_mean(str(value), choices)}")
            if type(value) in (int, float) and not value >= LEAST.get(f.name, 0):  # NaN too
                raise _wrong(f.name, value, f"at least {LEAST.get(f.name, 0)}")
        for name in POSITIVE:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise _wrong(name, value, "more than 0, and finite")
        if self.min_replicas > self.max_replicas:
            raise _wrong("min_replicas", self.min_replicas, f"at most max_replicas, which is {self.max_replicas}")
        if self.port > 65535:
            raise _wrong("port", self.port, "at most 65535")
        if any(not key for key in self.api_keys):
            raise ConfigError("one of api_keys is empty; expected none, or keys of at least one character", "api_keys")
        names, _, _ = self.sources, self.canary_name, self.engine  # each raises if it cannot be had
        unknown = next((name for name in self.eager if name != ALL and name not in names), None)
        if unknown is not None:
            raise _wrong("eager", unknown, f"{ALL}, or a name from models.{did_you_mean(unknown, names)}")

    @property
    def sources(self) -> dict[str, str]:
        """Each model's name and source, the default model first."""
        listed: dict[str, str] = {}
        for entry in self.models:
            name, _, source = (part.strip() for part in entry.partition("="))
            if not MODEL_NAME.fullmatch(name) or not source:
                raise _wrong("models", entry, f"NAME=SOURCE, such as gpt2=hf:openai-community/gpt2; NAME: {NAME_FORM}")
            if name in listed:
                raise _wrong("models", entry, f"each name once; {name} is {listed[name]} already")
            listed[name] = source
        if self.model in listed:
            return {self.model: listed.pop(self.model)} | listed
        if listed and not self.model:
            return listed
        if re.fullmatch(r"[\w.-]+", self.model) and not Path(self.model).exists():
            raise _wrong("model", self.model, f"a name from models or a source.{did_you_mean(self.model, listed)}")
        source = self.model or "models:/gpt@champion"
        name = name_of(source)
        if not MODEL_NAME.fullmatch(name):
            raise _wrong("model", self.model, f"a source with a name of {NAME_FORM}; or models=NAME={source}")
        if name in listed:
            raise _wrong("model", self.model, f"another name: {name!r} is {listed[name]!r} in models")
        return {name: source} | listed

    @property
    def default_model(self) -> str:
        """The name of the model that answers where a request names none."""
        return next(iter(self.sources))

    @property
    def canary_share(self) -> Canary | None:
        """The canary, if there is one."""
        if not self.canary:
            return None
        source, _, share = self.canary.rpartition(":")
        try:
            fraction = float(share)
        except ValueError:
            fraction = -1.0
        if not (source and 0 <= fraction <= 1):
            raise _wrong("canary", self.canary, "SOURCE:SHARE with a share from 0 to 1, as models:/gpt@candidate:0.1")
        return Canary(source, fraction)

    @property
    def canary_name(self) -> str:
        """What the canary is called, in `models` or after its source; "" if there is none."""
        canary, listed = self.canary_share, self.sources
        if canary is None or canary.source in listed:
            return canary.source if canary else ""
        name = name_of(canary.source)
        name = f"{name}-canary" if name in listed else name
        if name in listed or not MODEL_NAME.fullmatch(name):
            other = f"models=NAME={canary.source} and canary=NAME:{canary.share}"
            raise _wrong("canary", self.canary, f"a source with a name of its own, of {NAME_FORM}; or {other}")
        return name

    @property
    def places(self) -> int:
        """Sequences that a model has slots and queue for, as far as that is known before it is loaded."""
        return (self.slots or MOST_SLOTS) + self.max_queue

    @property
    def engine(self) -> EngineSettings:
        """What each model's engine is told."""
        return EngineSettings(**{f.name: getattr(self, f.name) for f in fields(EngineSettings)})


# What a number must be at least, where that is not 0; and those that must be more than 0.
LEAST = dict.fromkeys(
    ("max_new_tokens", "max_sequences", "max_body_bytes", "max_queue", "prefill_tokens", "max_replicas"), 1
)
POSITIVE = ("load_seconds", "poll_seconds", "body_timeout_s", "request_timeout_s", "target_ongoing_requests")

FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(ServeSettings)}
_HINTS = typing.get_type_hints(ServeSettings)


def load_settings(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> ServeSettings:
    """Settings from `given` (a builder's arguments) above `environ` (default: this process's environment).

    Paths and the tracking URI come out absolute. Raises ConfigError for an unknown key, or a value of another type or
    out of range. Other programs have names in GPT_ too, so one that is only close to a setting's is logged.
    """
    environ = os.environ if environ is None else environ
    for name in environ:
        setting_name = name.removeprefix(PREFIX).lower()
        unknown = name.startswith(PREFIX) and not name.startswith("GPT_FOUNDRY_") and setting_name not in FIELDS
        if unknown and (near := did_you_mean(setting_name, FIELDS)):
            log.warning("the environment's %s is no setting.%s", name, near)
    values = {}
    for name in FIELDS:
        if text := environ.get(PREFIX + name.upper(), ""):
            values[name] = _convert(name, text)
    for name, value in (given or {}).items():
        if name not in FIELDS:
            raise ConfigError(f"there is no setting {name!r}.{did_you_mean(name, FIELDS)}", param=name)
        values[name] = _convert(name, value)
    return _absolute(ServeSettings(**values), environ)


def name_of(source: str) -> str:
    """What a model is called of which only the source is known: gpt for models:/gpt@champion, gpt2 for hf:org/gpt2."""
    if source.startswith("models:/"):
        name, at, alias = source.removeprefix("models:/").partition("/")[0].partition("@")
        return f"{name}@{alias}" if at and alias != "champion" else name
    if source.startswith("runs:/"):
        return source.removeprefix("runs:/").partition("/")[0]
    last = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:64].strip(".-") or "model"


def markdown() -> str:
    """The table of the docs: one row per setting."""
    rows = ["| Setting | Environment | Default | What it says |", "| --- | --- | --- | --- |"]
    for name, f in FIELDS.items():
        default = ",".join(f.default) if isinstance(f.default, tuple) else f.default
        shown = "" if default == "" else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        text, unit, choices = (f.metadata.get(key, "") for key in ("help", "unit", "choices"))
        notes = (f" [{unit}]" if unit else "") + (f" One of {', '.join(choices)}." if choices else "")
        rows.append(f"| `{name}` | `{PREFIX}{name.upper()}` | {shown} | {text}{notes} |")
    return "\n".join(rows)


def _absolute(settings: ServeSettings, environ: Mapping[str, str]) -> ServeSettings:
    uri = settings.tracking_uri or default_tracking_uri(environ)
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    models = tuple(f"{name}={absolute_source(source)}" for name, source in settings.sources.items())
    canary = settings.canary_share
    absolute = ""
    if canary is not None:
        source = canary.source if canary.source in settings.sources else absolute_source(canary.source)
        absolute = f"{source}:{canary.share}"
    return replace(settings, tracking_uri=uri, models=models, model=settings.default_model, canary=absolute)


def absolute_source(source: str) -> str:
    """`source` as it is understood in any folder; only a path depends on where one stands."""
    if source.startswith(("models:/", "runs:/", "hf:")) or "://" in source:
        return source
    return str(expanded(source).absolute())


def _convert(name: str, value: Any) -> Any:
    """`value` (a string, or YAML's own type) as the field's type."""
    wanted = _HINTS[name]
    if typing.get_origin(wanted) is tuple:
        return _strings(name, value)
    try:
        if isinstance(value, (dict, list, tuple)) or (wanted is not bool and isinstance(value, bool)):
            raise ValueError
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).strip().lower()]
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if wanted is int else wanted(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]
        unit = FIELDS[name].metadata.get("unit")
        raise _wrong(name, value, kind + (f" of {unit}" if unit else "")) from None


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if name == "models" and isinstance(value, Mapping):  # YAML's way to write them
        value = [f"{key}={source}" for key, source in value.items()]
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise _wrong(name, value, "texts, comma-separated")
    return tuple(value)


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    shown = "not shown" if name == "api_keys" else repr(value)
    return ConfigError(f"{name} is {shown}; expected {expected}", param=name)


if __name__ == "__main__":
    print(markdown())
