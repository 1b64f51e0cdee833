"""The settings of a training run: one frozen dataclass, and the functions that build it.

In: a preset's name, a YAML file, command-line flags; later ones win. Out: a `TrainConfig`. Each setting is one line:
its default, help, unit, bounds, choices, and whether a resumed run may change it. `--help`, docs/configuration.md and
the checks are all made from that line.
"""

import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gptcore.config import ALL_LINEAR, LORA_TARGETS, MODEL_FIELDS, MODEL_PRESETS, Lora, ModelConfig
from gptcore.errors import ConfigError, did_you_mean
from train_job.fields import (
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    RETRIES,
    SEED,
    SHARE,
    bare,
    check,
    check_mlflow_name,
    convert,
    setting,
)
from train_job.presets import CHAT, LORA, PRESETS

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("wsd", "linear", "cosine")
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "bf16", "fp32")
PARALLEL = ("ddp", "fsdp")
REDUCE_PRECISIONS = ("fp32", "bf16")
PROMOTIONS = ("if-better", "always", "never")
OBJECTIVES = ("text", "chat")
LOG_INTERVAL, EVAL_INTERVAL = 10, 100
"""Steps, where neither the user nor the preset sets them and the run is long enough."""
UNBOUNDED = 2**40
"""More steps than any run takes."""
TUNED_LENGTH = 1024
"""Tokens per sequence in fine-tuning, where none are set: open models have contexts that no batch would fit."""
MOST_TOKENS = 2**31
"""The most tokens in a step; the largest published batches have tens of millions."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of one run. `model` holds the settings of the model's shape (see gptcore.config.ModelConfig)."""

    preset: str = setting("quick", "Preset to start from: a model shape and its training settings.")
    objective: str = setting(
        "text",
        "text: the model continues texts. chat: it answers, learned from the assistant's turns in conversations.",
        choices=OBJECTIVES,
        added=True,
    )
    # Text
    data: str = setting(
        "builtin",
        "builtin, builtin-chat, shakespeare, or a file, folder, glob or URL (text, jsonl, csv, parquet).",
    )
    val_data: str | None = setting(None, "Validation corpus; default: the end of the training corpus.")
    val_fraction: float = setting(0.1, "Share of the corpus, taken from its end, used for validation.", "0..1", SHARE)
    text_column: str = setting("text", "Column that holds the text in json, jsonl, csv, tsv and parquet files.")
    document_separator: str | None = setting(
        None, "String between documents, such as <|endoftext|>; it is not part of the text. Default: none.", added=True
    )
    tokenizer: str = setting("bpe:2048", "gpt2, bpe:N (N tokens, learned from the training split) or bytes.")
    cache_dir: str | None = setting(
        None,
        "Folder for token shards and downloads, or a URL to share shards; default: .cache at home.",
        resumable=True,
    )
    # Model
    model: dict[str, Any] = field(default_factory=dict, metadata={"help": "Shape of the model."})
    init_from: str | None = setting(None, "Fine-tune this package (folder, models:/…, runs:/…, hf:…).")
    lora_rank: int | None = setting(
        None,
        "Freeze the package and train low-rank adapters of this rank (LoRA); they are merged at the end.",
        "",
        POSITIVE,
        added=True,
    )
    lora_alpha: float | None = setting(
        None, "The adapters' product is scaled by alpha / rank; default: twice the rank.", "", POSITIVE, added=True
    )
    lora_targets: tuple[str, ...] = setting(
        (ALL_LINEAR,), f"Matrices with adapters: {ALL_LINEAR}, or some of {', '.join(LORA_TARGETS)}.", added=True
    )
    lora_dropout: float = setting(0.0, "Dropout on the adapters' input while training.", "", DECAY, added=True)
    # Batches
    batch_size: int = setting(8, "Sequences per step, over all workers.", "sequences", POSITIVE)
    micro_batch_size: int | None = setting(
        None, "Most sequences a worker processes at once; default: its whole share.", "", POSITIVE, resumable=True
    )
    sequence_length: int | None = setting(
        None,
        f"Tokens per training sequence; default: the preset's, or context_length (at most {TUNED_LENGTH:,} if tuned).",
        "tokens",
        POSITIVE,
    )
    stride: int | None = setting(
        None, "Tokens from one training window to the next; default: sequence_length.", "tokens", POSITIVE
    )
    seed: int = setting(1337, "Sets the initial weights, the order of the data and dropout.", "", SEED)
    # Optimizer
    optimizer: str = setting("muon", "muon (for matrices; AdamW for the rest) or adamw.", choices=OPTIMIZERS)
    learning_rate: float = setting(3e-3, "Peak learning rate of AdamW.", "", POSITIVE)
    matrix_learning_rate: float = setting(0.02, "Peak learning rate of Muon.", "", POSITIVE)
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices.", "", NOT_NEGATIVE)
    beta1: float = setting(0.8, "AdamW's first-moment decay.", "", DECAY)
    beta2: float = setting(0.95, "AdamW's second-moment decay.", "", DECAY)
    momentum: float = setting(0.95, "Muon's momentum.", "", SHARE)
    grad_clip: float = setting(1.0, "Largest gradient norm; 0 turns clipping off.", "", NOT_NEGATIVE)
    schedule: str = setting(
        "wsd", "Learning rate after warm-up: wsd (constant, then linear decay), linear or cosine.", choices=SCHEDULES
    )
    warmup_steps: int = setting(20, "Steps in which the learning rate rises from 0.", "steps", NOT_NEGATIVE)
    cooldown_fraction: float = setting(0.6, "Share of the run in which wsd decays.", "0..1", SHARE)
    min_lr_fraction: float = setting(0.0, "Final learning rate, as a share of the peak.", "0..1", SHARE)
    # When to stop: whichever comes first
    max_steps: int | None = setting(None, "Stop after this many optimizer steps.", "steps", POSITIVE, resumable=True)
    max_epochs: float | None = setting(
        None, "Stop after this many passes over the training split.", "epochs", POSITIVE, resumable=True
    )
    max_tokens: int | None = setting(None, "Stop after this many training tokens.", "tokens", POSITIVE, resumable=True)
    max_minutes: float | None = setting(
        None, "Stop after this many minutes of training.", "minutes", POSITIVE, resumable=True
    )
    target_loss: float | None = setting(
        None, "Stop once the validation loss is this low.", "nats/token", POSITIVE, resumable=True
    )
    target_bits_per_byte: float | None = setting(
        None, "Stop once validation bits per byte are this low.", "bits/byte", POSITIVE, resumable=True
    )
    target_train_loss: float | None = setting(
        None,
        "Stop once the mean training loss over log_interval steps is this low, and keep that step.",
        "nats/token",
        POSITIVE,
        resumable=True,
    )
    patience: int | None = setting(
        None, "Stop after this many evaluations without improvement.", "evaluations", POSITIVE, resumable=True
    )
    # Logging, evaluation and checkpoints
    log_interval: int | None = setting(
        None, "Steps between logged metrics; default: 10, fewer in a short run.", "steps", POSITIVE, resumable=True
    )
    eval_interval: int | None = setting(
        None,
        "Steps between evaluations on the whole validation split; default: the preset's or 100, fewer in a short run.",
        "steps",
        POSITIVE,
        resumable=True,
    )
    checkpoint_interval: int | None = setting(
        None, "Steps between checkpoints; default: eval_interval.", "steps", POSITIVE, resumable=True
    )
    sample_prompts: tuple[str, ...] = setting(
        ("The",), "Prompts that the model continues at every evaluation.", resumable=True
    )
    sample_tokens: int = setting(
        48, "Length of those samples; 0 turns them off.", "tokens", NOT_NEGATIVE, resumable=True
    )
    # Machine
    device: str = setting("auto", "cuda, mps, cpu, or auto: the best available.", choices=DEVICES, resumable=True)
    precision: str = setting(
        "auto", "bf16 (autocast), fp32, or auto: bf16 where the hardware supports it.", choices=PRECISIONS
    )
    compile: bool = setting(False, "Compile the model with torch.compile.", resumable=True)
    checkpoint_activations: bool = setting(
        False,
        "Keep only the blocks' inputs and recompute the rest in the backward pass: less memory, a third more work.",
        resumable=True,
        added=True,
    )
    # Several workers
    parallel: str = setting(
        "ddp",
        "ddp: each worker has the whole model. fsdp: weights, gradients and optimizer state are divided among them.",
        choices=PARALLEL,
        resumable=True,
        added=True,
    )
    reduce_precision: str = setting(
        "fp32",
        "Precision in which workers add up their gradients; bf16 sends half the bytes.",
        choices=REDUCE_PRECISIONS,
        resumable=True,
        added=True,
    )
    # Ray Train
    num_workers: str = setting("1", "Workers: N, or MIN:MAX for elastic training.", "workers", resumable=True)
    use_gpu: bool = setting(False, "Give each worker a GPU.", resumable=True)
    cpus_per_worker: float | None = setting(
        None, "CPUs for each worker; default: an equal share of the cluster's.", "", POSITIVE, resumable=True
    )
    max_failures: int = setting(
        3, "Restarts from the last checkpoint before the run fails; -1: no limit.", "", RETRIES, resumable=True
    )
    storage_path: str | None = setting(
        None, "Where runs are stored: a folder or fsspec URL; default: runs at home.", resumable=True
    )
    # Tracking
    name: str | None = setting(None, "Name of the run; default: the preset and the time.", resumable=True)
    resume: str | None = setting(None, "Continue the run of this name.", resumable=True)
    experiment: str = setting("gpt", "MLflow experiment.", resumable=True)
    register_as: str = setting("gpt", "Registered model that gets the new version.", resumable=True)
    promote: str = setting("if-better", "When @champion moves to the new version.", choices=PROMOTIONS, resumable=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f, getattr(self, f.name))
        check_mlflow_name("experiment", self.experiment)
        check_mlflow_name("register_as", self.register_as, refused="/:")
        if not self.sample_prompts:
            raise ConfigError("sample_prompts is empty; give one, or turn samples off with sample_tokens 0")
        if not self.val_data and not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}; expected between 0 and 1, or give val_data")
        if all(getattr(self, limit) is None for limit in LIMITS):
            raise ConfigError("the run has no limit; expected max_steps, max_epochs, max_tokens or max_minutes")
        if self.batch_size * self.context > MOST_TOKENS:
            raise ConfigError(
                f"batch_size is {self.batch_size}, with {self.context} tokens each; expected at most {MOST_TOKENS:,} "
                "tokens in a step"
            )
        if self.workers[1] > self.batch_size:
            raise ConfigError(
                f"num_workers {self.num_workers} is more than batch_size {self.batch_size}: one would be idle"
            )
        self.model_config(vocab_size=1)  # raises for an inconsistent shape
        self._check_objective()
        if self.lora_rank is None:
            idle = ("lora_alpha", "lora_targets", "lora_dropout")
            if given := [name for name in idle if getattr(self, name) != getattr(TrainConfig, name)]:
                raise ConfigError(f"{given[0]} has no effect without lora_rank; add it, such as lora_rank 16")
        elif not self.init_from:
            raise ConfigError(
                f"lora_rank is {self.lora_rank}, but there is no model to adapt; expected init_from, such as "
                "hf:Qwen/Qwen3-0.6B-Base"
            )
        self.lora  # noqa: B018 (raises for an unknown target)

    def _check_objective(self) -> None:
        chats = self.objective == "chat"
        for data in filter(None, (self.data, self.val_data)):
            if chats and data in ("builtin", "shakespeare"):
                raise ConfigError(f"{data} is text; with objective chat, expected conversations, such as builtin-chat")
            if not chats and data == "builtin-chat":
                raise ConfigError(f"{data} holds conversations; expected objective chat with it, or builtin")
        for name in ("stride", "document_separator", "text_column") if chats else ():
            if getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{name} has no effect with objective chat; leave it out")

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers."""
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

    @property
    def lora(self) -> Lora | None:
        """The adapters that are trained; None if the whole model is."""
        if self.lora_rank is None:
            return None
        return Lora(self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_dropout, self.lora_targets)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The shape of the model, with `vocab_size` rows of embedding."""
        return ModelConfig(vocab_size=vocab_size, **self.model)

    def planned_steps(self, steps_per_epoch: float | None = None) -> tuple[int, str]:
        """Steps until the first limit that can be counted in steps, and its name; UNBOUNDED if there is none.

        Without `steps_per_epoch`, which depends on the text, epochs do not count.
        """
        limits = {"max_steps": self.max_steps}
        if self.max_epochs is not None and steps_per_epoch is not None:
            limits["max_epochs"] = math.ceil(self.max_epochs * steps_per_epoch)
        if self.max_tokens is not None:
            limits["max_tokens"] = math.ceil(self.max_tokens / (self.batch_size * self.context))
        known = {name: steps for name, steps in limits.items() if steps is not None}
        limit = min(known, key=known.__getitem__) if known else "max_minutes"
        return known.get(limit, UNBOUNDED), limit

    def intervals(self, total_steps: int) -> tuple[int, int]:
        """Steps between logs and between evaluations: as set, else chosen so that a short run has several of each."""
        log, evaluation = LOG_INTERVAL, PRESETS[self.preset].get("eval_interval", EVAL_INTERVAL)
        log = log if total_steps >= 5 * log else max(1, total_steps // 5)
        evaluation = evaluation if total_steps >= 2 * evaluation else math.ceil(total_steps / 4)
        return self.log_interval or log, self.eval_interval or evaluation

    def flat(self) -> dict[str, Any]:
        """Every setting by name, including the model's: for YAML files and MLflow's parameters."""
        values = {
            n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items() if n != "model"
        }  # as in JSON
        model = self.model
        if self.init_from:  # shape and tokenizer come from the parent
            values.pop("tokenizer")
            model = {k: v for k, v in model.items() if k == "dropout"}
        return values | model


LIMITS = frozenset({"max_steps", "max_epochs", "max_tokens", "max_minutes"})
RESUMABLE = frozenset(f.name for f in fields(TrainConfig) if f.metadata.get("resumable"))
"""Settings that a resumed run may change; the others define its steps."""
ADDED = frozenset(f.name for f in fields(TrainConfig) if f.metadata.get("added"))
"""Settings that earlier versions did not have; runs without them started with the default."""

_TRAIN_FIELDS = {f.name: f for f in fields(TrainConfig) if f.name != "model"}
_FIELDS = _TRAIN_FIELDS | {f.name: f for f in MODEL_FIELDS}
HINTS = typing.get_type_hints(ModelConfig) | typing.get_type_hints(TrainConfig)


def build_config(*layers: Mapping[str, Any]) -> TrainConfig:
    """Builds a config from layers of settings; later layers win, and all of them win over the preset.

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
    if given.get("lora_rank"):
        recipe |= LORA
    if given.get("objective") == "chat":
        recipe |= CHAT
        recipe.pop("stride", None)  # a text's
    if given.keys() & LIMITS:  # a user's limit replaces the preset's
        recipe = {k: v for k, v in recipe.items() if k not in LIMITS}
    recipe.pop("eval_interval", None)  # `intervals` reads it from PRESETS, and shortens it for a short run
    values = recipe | {k: v for k, v in given.items() if k in _TRAIN_FIELDS}
    return TrainConfig(model=shape | {k: v for k, v in given.items() if k not in _TRAIN_FIELDS}, **values)


def resume_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """The saved run's config with the given settings applied.

    Raises ConfigError for a setting that a resumed run may not change.
    """
    old = build_config(saved).flat()
    for key, value in given.items():
        setting_type(key)
        if key not in RESUMABLE and setting_value(key, value) != old.get(key):
            before = old.get(key, "the parent's")
            raise ConfigError(
                f"{key} was {before!r} when run {given['resume']} began and cannot become {value!r} in a resumed run; "
                "leave it out, or start a new run (--init-from starts from its weights)"
            )
    if given.keys() & LIMITS:  # as in a new run, the user's limits replace all others
        old |= dict.fromkeys(LIMITS)
    return build_config(old, {k: v for k, v in given.items() if k in RESUMABLE - {"resume", "name"}})


def setting_type(name: str) -> Any:
    """The type of the setting, without `| None`. Raises ConfigError if there is no such setting."""
    if name not in _FIELDS:
        raise ConfigError(f"there is no setting {name!r}.{did_you_mean(str(name), _FIELDS)}")
    return bare(HINTS[name])[0]


def setting_value(name: str, value: Any) -> Any:
    """Converts `value` to the setting's type. Raises ConfigError if it cannot, or if there is no such setting."""
    setting_type(name)
    return convert(_FIELDS[name], HINTS[name], value)
