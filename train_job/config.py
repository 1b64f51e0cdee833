"""What a training run is told: one frozen dataclass, and the ways to fill it.

In: a preset's name, a YAML file, command-line flags; later ones win. Out: a `TrainConfig`. A field's help, unit and
choices stand beside its default and are the only description there is: `--help` and the docs are made from them.
"""

import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gptcore.config import MODEL_FIELDS, MODEL_PRESETS, ModelConfig, setting
from gptcore.errors import ConfigError, did_you_mean, excerpt
from train_job.files import written_whole

SCHEDULES = ("wsd", "linear", "cosine")
LOG_INTERVAL, EVAL_INTERVAL = 10, 100
"""Steps, where neither the user nor the preset says otherwise and the run is long enough."""
UNBOUNDED = 2**40
"""More steps than any run takes."""
MOST_TOKENS = 2**31
"""In a step; the largest published batches have tens of millions."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything one run is told. `model` holds the shape's settings (see gptcore.config.ModelConfig)."""

    preset: str = setting("quick", "Named starting point for the model and its recipe.")
    # Text
    data: str = setting("builtin", "builtin, shakespeare, or a file, folder, glob or URL (text, jsonl, csv, parquet).")
    val_data: str | None = setting(None, "Validation corpus; default: the end of the training corpus.")
    val_fraction: float = setting(0.1, "Share of the corpus kept for validation, taken from its end.", "0..1")
    text_column: str = setting("text", "Column with the text in json, jsonl, csv, tsv and parquet files.")
    document_separator: str | None = setting(
        None,
        "Characters that end a document, such as <|endoftext|>, and are no text; default: all characters are text.",
    )
    tokenizer: str = setting("bpe:2048", "gpt2, bpe:N (learned from the training split, N tokens) or bytes.")
    cache_dir: str | None = setting(
        None, "Where token shards and downloads are kept: a folder, or a URL to share shards; default: .cache at home."
    )
    # Model
    model: dict[str, Any] = field(default_factory=dict, metadata={"help": "Shape of the model."})
    init_from: str | None = setting(None, "Start from this package (folder, models:/…, runs:/…, hf:…): fine-tuning.")
    # Batches
    batch_size: int = setting(8, "Sequences per step over all workers.", "sequences")
    micro_batch_size: int | None = setting(None, "Most sequences a worker runs at once; default: its whole share.")
    sequence_length: int | None = setting(None, "Tokens per training sequence; default: context_length.", "tokens")
    stride: int | None = setting(None, "Distance between sliding windows; default: sequence_length.", "tokens")
    seed: int = setting(1337, "Decides initial weights, the order of the data and dropout.")
    # Optimizer
    optimizer: str = setting("muon", "muon (for matrices, AdamW for the rest) or adamw.", choices=("muon", "adamw"))
    learning_rate: float = setting(3e-3, "Peak learning rate of AdamW.")
    matrix_learning_rate: float = setting(0.02, "Peak learning rate of Muon.")
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices.")
    beta1: float = setting(0.8, "AdamW's first-moment decay.")
    beta2: float = setting(0.95, "AdamW's second-moment decay.")
    momentum: float = setting(0.95, "Muon's momentum.")
    grad_clip: float = setting(1.0, "Largest gradient norm; 0 turns clipping off.")
    schedule: str = setting(
        "wsd", "After warm-up: wsd (constant, then linear cool-down), linear or cosine.", choices=SCHEDULES
    )
    warmup_steps: int = setting(20, "Steps over which the learning rate rises from 0.", "steps")
    cooldown_fraction: float = setting(0.6, "Share of the run in which wsd cools down.", "0..1")
    min_lr_fraction: float = setting(0.0, "Where the learning rate ends, as a share of its peak.", "0..1")
    # When to stop: whichever comes first
    max_steps: int | None = setting(None, "Stop after this many optimizer steps.", "steps")
    max_epochs: float | None = setting(None, "Stop after this many passes over the training split.", "epochs")
    max_tokens: int | None = setting(None, "Stop after this many training tokens.", "tokens")
    max_minutes: float | None = setting(None, "Stop after this much training time.", "minutes")
    target_loss: float | None = setting(None, "Stop once the validation loss is this low.", "nats/token")
    target_bits_per_byte: float | None = setting(None, "Stop once validation bits per byte are this low.", "bits/byte")
    target_train_loss: float | None = setting(
        None, "Stop once the mean training loss of log_interval steps is this low, and keep that step.", "nats/token"
    )
    patience: int | None = setting(None, "Stop after this many evaluations without a better one.", "evaluations")
    # Looking at it
    log_interval: int | None = setting(
        None, "Steps between logged metrics; default: 10, fewer in a short run.", "steps"
    )
    eval_interval: int | None = setting(
        None,
        "Steps between evaluations on the whole validation split; default: the preset's or 100, fewer in a short run.",
        "steps",
    )
    checkpoint_interval: int | None = setting(None, "Steps between checkpoints; default: eval_interval.", "steps")
    sample_prompts: tuple[str, ...] = setting(("The",), "Prompts continued at every evaluation.")
    sample_tokens: int = setting(48, "Length of those samples; 0 turns them off.", "tokens")
    # Machine
    device: str = setting("auto", "cuda, mps, cpu, or auto: the best there is.", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = setting(
        "auto", "bf16 (autocast), fp32, or auto: bf16 where the hardware has it.", choices=("auto", "bf16", "fp32")
    )
    compile: bool = setting(False, "Compile the model with torch.compile.")
    # Ray Train
    num_workers: str = setting("1", "Workers: N, or MIN:MAX for elastic training.", "workers")
    use_gpu: bool = setting(False, "Give each worker a GPU.")
    cpus_per_worker: float | None = setting(None, "CPUs for each worker; default: an equal share of the cluster's.")
    max_failures: int = setting(3, "Restarts from the last checkpoint before the run is given up; -1: no limit.")
    storage_path: str | None = setting(None, "Where runs are kept: a folder or fsspec URL; default: runs at home.")
    # Tracking
    name: str | None = setting(None, "Name of the run; default: the preset and the time.")
    resume: str | None = setting(None, "Go on with this run (its name).")
    experiment: str = setting("gpt", "MLflow experiment.")
    register_as: str = setting("gpt", "Registered model that gets a new version.")
    promote: str = setting(
        "if-better", "When @champion moves to the new version.", choices=("if-better", "always", "never")
    )

    def __post_init__(self) -> None:
        positive = "batch_size micro_batch_size sequence_length stride max_steps max_epochs max_tokens max_minutes"
        positive += " patience log_interval eval_interval checkpoint_interval learning_rate matrix_learning_rate"
        positive += " cpus_per_worker target_loss target_bits_per_byte target_train_loss"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; expected more than 0, and finite")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; expected between 0 and 2**63 - 1")
        if self.max_failures < -1:
            raise ConfigError(f"max_failures is {self.max_failures}; expected -1 (no limit), 0 or more")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise ConfigError(f"{name} is 1; expected less")
        for name in ("weight_decay", "grad_clip", "warmup_steps", "sample_tokens"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("val_fraction", "cooldown_fraction", "min_lr_fraction", "beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected between 0 and 1")
        for name in ("register_as", "experiment"):
            _check_mlflow_name(name, getattr(self, name))
        if not self.sample_prompts:
            raise ConfigError("sample_prompts is empty; give one, or turn samples off with sample_tokens 0")
        for f in fields(self):
            _check_choice(f, getattr(self, f.name))
        if not self.val_data and not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}; expected between 0 and 1, or give val_data")
        if self.planned_limits() == [] and self.max_minutes is None:
            raise ConfigError("nothing says when to stop; expected max_steps, max_epochs, max_tokens or max_minutes")
        if self.batch_size * self.context > MOST_TOKENS:
            raise ConfigError(
                f"batch_size is {self.batch_size}, with {self.context} tokens each; expected at most {MOST_TOKENS:,} "
                "tokens in a step"
            )
        if self.workers[1] > self.batch_size:
            raise ConfigError(
                f"num_workers {self.num_workers} is more than batch_size {self.batch_size}: a worker would idle"
            )
        self.model_config(vocab_size=1)  # raises if the shape does not fit itself

    @property
    def workers(self) -> tuple[int, int]:
        """(fewest, most) workers."""
        low, _, high = self.num_workers.partition(":")
        try:
            bounds = int(low), int(high or low)
        except ValueError:
            bounds = (0, 0)
        if not 1 <= bounds[0] <= bounds[1]:
            raise ConfigError(f"num_workers is {self.num_workers!r}; expected N or MIN:MAX, such as 2 or 1:4")
        return bounds

    @property
    def context(self) -> int:
        """Tokens per training sequence."""
        return self.sequence_length or self.model_config(1).context_length

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The shape that is trained, with `vocab_size` rows of embedding."""
        return ModelConfig(vocab_size=vocab_size, **self.model)

    def planned_limits(self) -> list[str]:
        """Names of the limits that are known in steps before the run starts."""
        return [name for name in ("max_steps", "max_epochs", "max_tokens") if getattr(self, name) is not None]

    def planned_steps(self, steps_per_epoch: float) -> tuple[int, str]:
        """(steps until the first limit that can be counted in steps, its name); UNBOUNDED where there is none."""
        limits = {"max_steps": self.max_steps}
        if self.max_epochs is not None:
            limits["max_epochs"] = math.ceil(self.max_epochs * steps_per_epoch)
        if self.max_tokens is not None:
            limits["max_tokens"] = math.ceil(self.max_tokens / (self.batch_size * self.context))
        known = {name: steps for name, steps in limits.items() if steps is not None}
        limit = min(known, key=known.__getitem__) if known else "max_minutes"
        return known.get(limit, UNBOUNDED), limit

    def intervals(self, total_steps: int) -> tuple[int, int]:
        """(steps between logs, between evaluations): as given, else what shows a run of so many steps as it goes."""
        log, judge = LOG_INTERVAL, PRESETS[self.preset].get("eval_interval", EVAL_INTERVAL)
        log = log if total_steps >= 5 * log else max(1, total_steps // 5)
        judge = judge if total_steps >= 2 * judge else math.ceil(total_steps / 4)
        return self.log_interval or log, self.eval_interval or judge

    def flat(self) -> dict[str, Any]:
        """Every setting under its own name, the model's among them: for YAML files and MLflow's parameters."""
        values = asdict(self) | {"sample_prompts": list(self.sample_prompts)}
        model = values.pop("model")
        if self.init_from:  # the parent's, whatever the preset says
            values.pop("tokenizer")
            model = {k: v for k, v in model.items() if k == "dropout"}
        return values | model


LIMITS = frozenset({"max_steps", "max_epochs", "max_tokens", "max_minutes"})

# Settings that may change when a run goes on; any other decides what a step is.
RESUMABLE = frozenset(
    {
        "resume",
        "name",
        "max_steps",
        "max_epochs",
        "max_tokens",
        "max_minutes",
        "target_loss",
        "target_bits_per_byte",
        "target_train_loss",
        "patience",
        "log_interval",
        "eval_interval",
        "checkpoint_interval",
        "sample_prompts",
        "sample_tokens",
        "device",
        "compile",
        "num_workers",
        "use_gpu",
        "cpus_per_worker",
        "max_failures",
        "micro_batch_size",
        "cache_dir",
        "storage_path",
        "experiment",
        "register_as",
        "promote",
    }
)

_GPT2_ADAMW = dict(optimizer="adamw", tokenizer="gpt2", beta1=0.9, schedule="cosine", min_lr_fraction=0.1)

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(max_epochs=3, max_steps=600, learning_rate=6e-3, cooldown_fraction=0.45, eval_interval=50),
    "gpt2-124m": _GPT2_ADAMW
    | dict(batch_size=480, micro_batch_size=16, learning_rate=6e-4, warmup_steps=700, max_tokens=10_000_000_000)
    | dict(eval_interval=1000, precision="auto"),
    "foundry-124m": dict(
        tokenizer="gpt2",
        batch_size=512,
        micro_batch_size=16,
        warmup_steps=200,
        max_tokens=2_500_000_000,
        eval_interval=500,
    ),
    # The recipes of the projects that this one succeeds, where they say them.
    "tiny": _GPT2_ADAMW | dict(batch_size=16, learning_rate=1e-3, max_steps=500),
    "shakespeare": _GPT2_ADAMW
    | dict(data="shakespeare", batch_size=16, sequence_length=128, learning_rate=3e-4, max_epochs=10),
    "story": _GPT2_ADAMW
    | dict(batch_size=2, learning_rate=4e-4, stride=128, max_epochs=10, warmup_steps=0, eval_interval=50),
    "mini": _GPT2_ADAMW | dict(batch_size=16, learning_rate=1e-3, max_epochs=5),
}

_TRAIN_FIELDS = {f.name: f for f in fields(TrainConfig) if f.name != "model"}
_FIELDS = _TRAIN_FIELDS | {f.name: f for f in MODEL_FIELDS}
HINTS = typing.get_type_hints(ModelConfig) | typing.get_type_hints(TrainConfig)


def build_config(*layers: Mapping[str, Any]) -> TrainConfig:
    """A config from layers of settings, later ones winning; the preset they name comes below all of them.

    Raises ConfigError for an unknown key or preset, or a value of the wrong type.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            given[key] = setting_value(key, value)
    preset = given.get("preset", TrainConfig.preset)
    if preset not in PRESETS:
        raise ConfigError(
            f"no preset is called {preset!r}; there are {', '.join(PRESETS)}.{did_you_mean(str(preset), PRESETS)}"
        )
    if given.get("init_from"):
        taken = sorted({f.name for f in MODEL_FIELDS if f.name != "dropout"} & set(given) | {"tokenizer"} & set(given))
        if taken:
            raise ConfigError(f"init_from brings its own model and tokenizer; leave out {', '.join(taken)}")
    recipe, shape = dict(PRESETS[preset]), dict(MODEL_PRESETS[preset])
    if given.keys() & LIMITS:  # a user's limit replaces the recipe's
        recipe = {k: v for k, v in recipe.items() if k not in LIMITS}
    recipe.pop("eval_interval", None)  # `intervals` knows it, and what there is when the run is too short for it
    values = recipe | {k: v for k, v in given.items() if k in _TRAIN_FIELDS}
    return TrainConfig(model=shape | {k: v for k, v in given.items() if k not in _TRAIN_FIELDS}, **values)


@functools.cache
def _loader() -> Any:
    """YAML's safe loader, but 1:4 is text: YAML 1.1 takes it for sixty and four."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Without numbers of base 60."""

    text = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))
    Loader.yaml_implicit_resolvers = {
        first: [text, *rules] for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in a YAML file. Raises ConfigError if it cannot be read or is no mapping."""
    import yaml

    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _loader())  # a safe one
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date that is none
        raise ConfigError(f"cannot read the config file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"the config file {path} holds no settings; expected lines such as `batch_size: 16`")
    return loaded


def write_yaml(config: TrainConfig, path: Path) -> None:
    """The resolved config, every field named: `--config` reads it back."""
    import yaml

    with written_whole(path) as file:
        file.write(yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True).encode())


def resume_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """The saved run's config, changed by those of the given settings that a resume may change.

    Raises ConfigError for a setting that would make the steps to come differ from the steps done.
    """
    old = build_config(saved).flat()
    for key, value in given.items():
        setting_type(key)
        if key not in RESUMABLE and setting_value(key, value) != old.get(key):
            before = old.get(key, "the parent's")
            raise ConfigError(
                f"{key} was {before!r} when run {given['resume']} began and cannot become {value!r} as it goes on; "
                "leave it out, or begin a new run (--init-from takes the weights along)"
            )
    if given.keys() & LIMITS:  # as in a new run, limits of one's own replace those there were
        old |= dict.fromkeys(LIMITS)
    return build_config(old, {k: v for k, v in given.items() if k in RESUMABLE - {"resume", "name"}})


def bare(hint: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether None is allowed."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    return next(o for o in typing.get_args(hint) if o is not types.NoneType), True


def _check_mlflow_name(setting: str, name: str) -> None:
    """Raises ConfigError for a name that MLflow would refuse once the run is done."""
    refused = "/:" if setting == "register_as" else ""
    if not name.strip() or not name.isprintable() or len(name) > 250 or set(name) & set(refused):
        signs = ", without / and :" if refused else ""
        raise ConfigError(f"{setting} is {excerpt(name)}; expected a name of at most 250 characters{signs}")


def _check_choice(f: Any, value: Any) -> None:
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{f.name} is {value!r}; expected {', '.join(choices)}.{did_you_mean(str(value), choices)}")


def setting_type(name: str) -> Any:
    """The type of the setting's values, None aside. Raises ConfigError if there is no such setting."""
    if name not in _FIELDS:
        raise ConfigError(f"there is no setting {name!r}.{did_you_mean(str(name), _FIELDS)}")
    return bare(HINTS[name])[0]


def setting_value(name: str, value: Any) -> Any:
    """`value` as the setting's type. Raises ConfigError if it is none, or if there is no such setting."""
    setting_type(name)
    return convert(_FIELDS[name], HINTS[name], value)


def _text(name: str, value: str) -> str:
    """The value, if it is text that a file and MLflow can keep. Raises ConfigError."""
    if "\0" in value:
        raise ConfigError(f"{name} is {value!r}; expected text without the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {value!r}; expected text in UTF-8") from None
    return value


def convert(f: Any, hint: Any, value: Any) -> Any:
    """`value` (a flag's string or YAML's own type) as the field's type. Raises ConfigError if it is none."""
    wanted, optional = bare(hint)
    if value is None and optional:
        return None
    if typing.get_origin(wanted) is tuple:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or any(isinstance(text, (list, dict, type(None))) for text in texts):
            raise ConfigError(f"{f.name} is {value!r}; expected a list of texts")
        return tuple(_text(f.name, str(text)) for text in texts)
    if optional and str(value).lower() == "none":
        return None
    try:
        if wanted is str and isinstance(value, str):
            if not value:
                raise ConfigError(f"{f.name} is empty; give it a value, or leave it out")
            return _text(f.name, value)
        if wanted is int and isinstance(value, (int, str)) and re.fullmatch(r"[-+]?\d{1,300}", str(value)):
            return int(value)  # by way of a float, the last digits of a large one would be others
        if wanted is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if wanted is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        if isinstance(value, (list, dict)) or (wanted is float and isinstance(value, bool)):
            raise ValueError
        return int(float(value)) if wanted is int else wanted(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]
        unit = f" ({f.metadata['unit']})" if f.metadata["unit"] else ""
        raise ConfigError(f"{f.name} is {value!r}; expected {kind}{unit}") from None
