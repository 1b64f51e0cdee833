"""The settings of a service: one frozen dataclass, and how it is read from the environment and from arguments.

Settings come from the environment (`GPT_` and the setting's name in capitals) and from the arguments of `serve run
serve_app:build_app key=value ...` or of a Serve config (`args`), which take precedence. Paths are made absolute, since
replicas run in another folder. Each field carries its help and unit; `python -m serve_app.settings` prints the docs'
table from them.
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
from gptcore.engine.settings import CHOICES, MOST_SLOTS, EngineSettings, target_ongoing_requests
from gptcore.errors import ConfigError, did_you_mean
from gptcore.home import default_tracking_uri, expanded
from serve_app.front.haproxy import BODY_SECONDS, REQUEST_SECONDS

log = logging.getLogger(__name__)

PREFIX = "GPT_"
LOG_LEVELS = ("debug", "info", "warning", "error")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""Names appear in a header."""
NAME_FORM = "1 to 64 of A-Z a-z 0-9 . _ @ -, starting with a letter or digit"
ALL = "all"
LATE_SECONDS = 10.0
"""How long after its stop a replica may still get requests, with some to spare."""


@dataclass(frozen=True)
class Canary:
    """The share of the default model's requests that another source answers."""

    source: str
    share: float


@dataclass(frozen=True)
class ServeSettings:
    """All settings of one service. Raises ConfigError for an invalid value."""

    # Models
    model: str = setting(
        "",
        "The default model, used when a request names none: a name from `models`, or a source (a folder, "
        "models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model, hf:ORG/NAME or s3://…). Default: the first of "
        "`models`, else models:/gpt@champion.",
    )
    models: tuple[str, ...] = setting((), "The models to serve, as NAME=SOURCE, comma-separated.")
    eager: tuple[str, ...] = setting(
        (), f"Models to load at startup, or {ALL}; others load on first use. The default model always loads at startup."
    )
    canary: str = setting(
        "",
        "A model that answers a share of the default model's requests, as SOURCE:SHARE or NAME:SHARE, such as "
        "models:/gpt@candidate:0.1. A hash of the request's id decides which requests.",
    )
    system_prompt: str = setting(
        "",
        "The system message of every conversation at /v1/chat/completions, which may then have no other. Default: the "
        "client's, if it sends one.",
    )
    feedback: str = setting(
        "",
        "Folder or URL (s3://…) for the votes on answers that POST /v1/feedback takes, with their conversations. "
        "Default: none, and no text is kept.",
    )
    feedback_bytes: int = setting(
        100_000_000, "About the most bytes of votes that are kept; the oldest are deleted.", "bytes"
    )
    tracking_uri: str = setting(
        "",
        "MLflow's tracking URI for models:/ and runs:/. Default: $MLFLOW_TRACKING_URI, else the embedded database.",
    )
    load_seconds: float = setting(600.0, "Time limit for loading a model, including its download.", "seconds")
    poll_seconds: float = setting(5.0, "How often to ask the registry which version an alias points to.", "seconds")
    # Access and limits
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={"help": "API keys, comma-separated; a request must carry one of them. Default: no key is needed."},
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Host names (the Host header without the port) that requests may use besides loopback names, or * for any. "
        "Default: any; but a service on loopback without API keys accepts loopback names only, so that no web page can "
        "reach it through DNS rebinding.",
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Origins whose web pages may call the service, or * for any. Default: none."
    )
    max_prompt_tokens: int = setting(0, "Longest prompt; 0: as long as fits the model's context.", "tokens")
    max_new_tokens: int = setting(4096, "Most new tokens per sequence.", "tokens")
    max_sequences: int = setting(64, "Most sequences per request: its prompts times n.", "sequences")
    max_body_bytes: int = setting(1_000_000, "Largest request body.", "bytes")
    body_timeout_s: float = setting(
        BODY_SECONDS, "Time limit for receiving a request's body; the reply is 408 after that.", "seconds"
    )
    request_timeout_s: float = setting(
        REQUEST_SECONDS, "Time limit for a whole request, including queueing and streaming; 504 after that.", "seconds"
    )
    stream_interval_ms: float = setting(
        40.0, "Shortest time between two events of a stream, after the first; 0: send every token at once.", "ms"
    )
    # Engine
    engine: str = setting(
        "foundry",
        "foundry: our own engine. vllm: vLLM behind the same interface; the service must run from an environment that "
        "has it (docs/serving.md).",
        choices=CHOICES["engine"],
    )
    slots: int = setting(
        0,
        "Sequences that a model decodes together; 0: as many as half the free memory holds, at most 16, or 64 on CUDA.",
        "sequences",
    )
    max_context: int = setting(
        0,
        "Longest sequence, if the model's context is longer; 0: what memory holds for all slots, or for four.",
        "tokens",
    )
    max_queue: int = setting(
        64, "Requests that may wait for a slot in a replica; further ones get 503 with Retry-After.", "requests"
    )
    prefill_tokens: int = setting(256, "Prompt tokens processed in each decoding step.", "tokens")
    dtype: str = setting(
        "auto", "Precision; auto: bfloat16 where the hardware supports it, else float32.", choices=CHOICES["dtype"]
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps; auto: the GPU if the replica has one.")
    backend: str = setting(
        "auto", "auto: the native kernel on a CPU where it can be compiled, else torch.", choices=CHOICES["backend"]
    )
    weights: str = setting(
        "",
        "Quantise the matrices while they are loaded, to 8 or 4 bits: less memory, faster decoding (native kernel "
        "only). Default: as dtype.",
        choices=CHOICES["weights"],
    )
    threads: int = setting(
        0, "Compute threads per model; 0: num_cpus, or the machine's CPUs / max_replicas if that is 0.", "threads"
    )
    compile: bool = setting(False, "Use torch.compile: slower startup, faster steps.")
    prefix_cache: bool = setting(True, "Reuse cached keys and values of prompts that start the same.")
    speculation: bool = setting(
        True,
        "Compute several tokens in a step where a text repeats itself. The text is the same with and without. Only the "
        "native kernel does; elsewhere this has no effect.",
    )
    tensor_parallel: int = setting(
        1, "With vllm: GPUs among which each matrix of a model is split; Ray reserves as many per replica.", "GPUs"
    )
    gpu_share: float = setting(
        0.45,
        "With vllm: share of each GPU's memory for one version of one model; at most 0.5, so that a new version can be "
        "loaded while the old one answers.",
    )
    # Replicas
    min_replicas: int = setting(1, "Fewest replicas; 0: scale to zero while there are no requests.", "replicas")
    max_replicas: int = setting(1, "Most replicas.", "replicas")
    target_ongoing_requests: float = setting(
        0.0,
        "Requests per replica, waiting or running, that autoscaling aims for; 0: 70% of its slots, with the most that "
        "slots=0 chooses.",
        "requests",
    )
    upscale_delay_s: float = setting(10.0, "How long load must stay high before a replica is added.", "seconds")
    downscale_delay_s: float = setting(120.0, "How long load must stay low before a replica is removed.", "seconds")
    num_cpus: float = setting(
        0.0, "CPUs that Ray reserves per replica; 0: none, so a replica also starts on a busy machine.", "CPUs"
    )
    num_gpus: float = setting(
        0.0, "GPUs that Ray reserves per replica; 0: none, or tensor_parallel if that is more than 1.", "GPUs"
    )
    drain_seconds: float = setting(
        0.0, "How long a replica that stops may finish its requests; 0: as long as a request may take.", "seconds"
    )
    host: str = setting(
        "127.0.0.1", "Address to listen on; 0.0.0.0 accepts other machines. Applies to the process that starts Serve."
    )
    port: int = setting(8000, "Port to listen on. Applies to the process that starts Serve.")
    log_level: str = setting("info", "Log level.", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                expected = ", ".join(filter(None, choices))
                raise _wrong(f.name, value, f"one of {expected}.{did_you_mean(str(value), choices)}")
            if type(value) in (int, float) and not value >= LEAST.get(f.name, 0):  # NaN too
                raise _wrong(f.name, value, f"at least {LEAST.get(f.name, 0)}")
        for name in POSITIVE:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise _wrong(name, value, "more than 0, and finite")
        if self.min_replicas > self.max_replicas:
            raise _wrong("min_replicas", self.min_replicas, f"at most max_replicas, which is {self.max_replicas}")
        if self.tensor_parallel > 1 and 0 < self.num_gpus < self.tensor_parallel:
            raise _wrong("num_gpus", self.num_gpus, f"at least tensor_parallel, which is {self.tensor_parallel}, or 0")
        if self.port > 65535:
            raise _wrong("port", self.port, "at most 65535")
        if any(not key for key in self.api_keys):
            raise ConfigError("one of api_keys is empty; expected none, or keys of at least one character", "api_keys")
        names, _, _ = self.sources, self.canary_name, self.engine_settings  # each raises if it is invalid
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
        """The name of the default model."""
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
        """The canary's name, from `models` or from its source; "" without a canary."""
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
        """Slots and queue places of a model; before it is loaded, an upper bound."""
        return (self.slots or max(MOST_SLOTS.values())) + self.max_queue

    @property
    def target_ongoing(self) -> float:
        """Requests per replica that autoscaling aims for."""
        gpu = self.gpus > 0 or self.device.startswith("cuda")
        return self.target_ongoing_requests or target_ongoing_requests(
            self.slots or MOST_SLOTS["cuda" if gpu else "cpu"]
        )

    @property
    def drain(self) -> float:
        """How long a replica that stops may finish its requests, in seconds.

        By default, it is as long as a request may take that arrives just before the front knows that the replica stops.
        """
        return self.drain_seconds or self.request_timeout_s + LATE_SECONDS

    @property
    def engine_settings(self) -> EngineSettings:
        """The settings of each model's engine."""
        return EngineSettings(**{f.name: getattr(self, f.name) for f in fields(EngineSettings)})

    @property
    def gpus(self) -> float:
        """GPUs that Ray reserves per replica."""
        split = self.tensor_parallel > 1 and self.device != "cpu"
        return self.num_gpus or (float(self.tensor_parallel) if split else 0.0)


# The least value of a number, where it is not 0; and numbers that must be greater than 0. EngineSettings has its own.
LEAST = dict.fromkeys(("max_new_tokens", "max_sequences", "max_body_bytes", "max_replicas"), 1) | {
    "feedback_bytes": 2_000_000
}
POSITIVE = ("load_seconds", "poll_seconds", "body_timeout_s", "request_timeout_s")

FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(ServeSettings)}
_HINTS = typing.get_type_hints(ServeSettings)


def load_settings(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> ServeSettings:
    """Settings from `given` (a builder's arguments), which take precedence, and `environ` (default: the environment).

    Paths and the tracking URI become absolute. Raises ConfigError for an unknown key or an invalid value. Other
    programs use GPT_ variables too, so an unknown variable is only logged, and only if it resembles a setting.
    """
    environ = os.environ if environ is None else environ
    for name in environ:
        setting_name = name.removeprefix(PREFIX).lower()
        unknown = name.startswith(PREFIX) and not name.startswith("GPT_FOUNDRY_") and setting_name not in FIELDS
        if unknown and (near := did_you_mean(setting_name, FIELDS)):
            log.warning("the environment variable %s is not a setting.%s", name, near)
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
    """A model's name, made from its source: gpt for models:/gpt@champion, gpt2 for hf:org/gpt2."""
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
        notes = (f" [{unit}]" if unit else "") + (f" One of {', '.join(filter(None, choices))}." if choices else "")
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
    feedback = settings.feedback and absolute_source(settings.feedback)
    return replace(
        settings,
        tracking_uri=uri,
        models=models,
        model=settings.default_model,
        canary=absolute,
        feedback=feedback,
    )


def absolute_source(source: str) -> str:
    """`source` with an absolute path, if it is a path."""
    if source.startswith(("models:/", "runs:/", "hf:")) or "://" in source:
        return source
    return str(expanded(source).absolute())


def _convert(name: str, value: Any) -> Any:
    """`value` (a string, or a YAML value) as the field's type."""
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
    if name == "models" and isinstance(value, Mapping):  # as a mapping in YAML
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
