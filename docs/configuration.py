"""`docs/configuration.md`: every setting, preset and environment variable, from where each is defined.

    python -m docs.configuration        (or make docs)

In: the dataclasses of training and service, whose fields have their help, and the list of environment variables below.
Out: the page. A test fails if the page is out of date, or if a variable in the code is not listed.
"""

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from gptcore.config import MODEL_PRESETS, ModelConfig
from gptcore.engine.vllm_engine import ENVIRONMENT as VLLM_ENV
from gptcore.hf_format import empty_model
from gptcore.tokenizer import parse_tokenizer
from serve_app import settings as service
from serve_app.front.haproxy import FRONT, HARD_STOP, SWITCH
from serve_app.models.registry import HTTP_PATIENCE
from train_job.cli import groups
from train_job.cluster.connect import LOCAL_RAY, PRELOAD
from train_job.config import LIMITS, PRESETS, RESUMABLE, TrainConfig, build_config
from train_job.data.inputs import VOCAB_MULTIPLE
from train_job.figures import short_count
from train_job.training.hardware import WORKER_ENV

PAGE = Path(__file__).with_suffix(".md")
COMMAND = "make docs"
NAMES_THE_RUN = {"name", "resume"}
"""Flags that name the run to resume and are not settings of a run."""


@dataclass(frozen=True)
class Variable:
    """An environment variable: its purpose and its default. `X_*` stands for every name that begins with `X_`."""

    name: str
    help: str
    default: str = ""


OURS = (
    Variable("GPT_FOUNDRY_HOME", "Where runs, caches and the embedded MLflow are kept.", "the checkout"),
    Variable("GPT_FOUNDRY_DATA", "A folder that holds `tinyshakespeare.txt`, for `--data shakespeare` offline."),
    Variable("GPT_*", "Every setting of [the service](#the-service), in capitals."),
    Variable("GPT_FOUNDRY_API_KEY", "`serve_app.chat`: the key, if the service requires one."),
    Variable("NO_COLOR", "`serve_app.chat`: plain text, as with `TERM=dumb`."),
    Variable("TERM", "The type of the terminal."),
    Variable("XDG_STATE_HOME", "`serve_app.chat`: where the history of prompts is saved.", "`~/.local/state`"),
    Variable("PATH", "Where to look for HAProxy if Ray does not include it.", "the system's"),
    Variable("CXX", "The C++ compiler that builds the engine's kernel.", "the first of c++, g++, clang++"),
    Variable("PYTHON", "make: the Python for `.venv`.", "`python3.11`"),
    Variable("PORT", "`make ui`, `make serve`, `make chat`: the port.", "`5000`, `8000`"),
    Variable("MODEL", "`make serve`: the model, a folder or a name as for `model` below.", "`models:/gpt@champion`"),
)
THEIRS = (
    Variable(
        "MLFLOW_TRACKING_URI", "Where runs are tracked and models registered.", "the embedded database, a file at home"
    ),
    Variable("MLFLOW_TRACKING_USERNAME", "The user, if the tracking server requires one."),
    Variable("MLFLOW_TRACKING_PASSWORD", "The password of that user."),
    Variable("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "`false`: MLflow opens no pickled model.", "`true`"),
    Variable(
        "RAY_ADDRESS",
        "The Ray cluster to join: `HOST:6379`, or `local` for a separate Ray.",
        "the one from `ray start` on this machine",
    ),
    Variable("RAY_AUTH_MODE", "`token`: Ray's nodes and clients require the token.", "`token` if the file exists"),
    Variable("RAY_AUTH_TOKEN", "The cluster's token itself.", "the content of the file"),
    Variable("RAY_AUTH_TOKEN_PATH", "The file with the token.", "`~/.ray/auth_token`"),
    Variable("RAY_JOB_CONFIG_JSON_ENV_VAR", "Set by Ray in a job: printed commands then name the machine."),
    Variable("RAY_API_SERVER_ADDRESS", "`ray job`: the dashboard that receives the job.", "the one on this machine"),
    Variable("RAY_JOB_STOP_WAIT_TIME_S", "Of a cluster: seconds that a stopped job has to save a checkpoint.", "`3`"),
    Variable("RAY_health_check_period_ms", "Of a cluster: how often its machines are checked.", "Ray's own"),
    Variable("RAY_health_check_timeout_ms", "Of a cluster: the time limit of such a check.", "Ray's own"),
    Variable("RAY_metrics_report_interval_ms", "How often Ray exports metrics to Prometheus.", "`10000`"),
    Variable("RAY_DEDUP_LOGS_SKIP_REGEX", "Ray's lines that are not printed.", "misleading ones"),
    Variable("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", "How long HAProxy waits for an answer.", "forever"),
    Variable(
        HARD_STOP,
        "How long a replaced HAProxy may finish its requests.",
        "`request_timeout_s` and 30",
    ),
    Variable(SWITCH, "The proxy in front of the replicas: `1` HAProxy, `0` Ray's own.", "`1` if HAProxy is installed"),
    Variable("HF_HOME", "Hugging Face's folder, for `hf:` models.", "`~/.cache/huggingface`"),
    Variable("HF_HUB_CACHE", "Its cache of models.", "`$HF_HOME/hub`"),
    Variable("TIKTOKEN_CACHE_DIR", "Where tiktoken looks for GPT-2's vocabulary before it downloads it."),
    Variable("SSL_CERT_FILE", "The certificates that downloads and the chat trust.", "those of the libraries"),
)
SET = (
    Variable("RAY_USAGE_STATS_ENABLED", "Ray sends no usage statistics.", "`0`"),
    Variable(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1: Ray Train watches for nodes that are about to be removed.", "`0`"
    ),
    Variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "Seconds between Ray Train's checks of its workers.", "`0.5`"),
    Variable(
        "RAY_SERVE_*",
        "How the service's front starts and answers; `python -m serve_app.front.haproxy` prints them.",
    ),
    Variable("MLFLOW_CONFIGURE_LOGGING", "MLflow's INFO lines, which would appear between ours.", "`false`"),
    Variable("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "Its progress bar.", "`false`"),
    Variable("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLflow would print addresses with their passwords.", "`true`"),
    *(
        Variable(n, "Timeouts and retries of a service's requests to the registry.", f"`{v}`")
        for n, v in HTTP_PATIENCE.items()
    ),
    Variable("RAY_AIR_NEW_OUTPUT", "Sweeps: Ray Tune's own tables.", "`0`"),
    Variable("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "Sweeps: our own files have what they would write.", "`1`"),
    Variable("RAY_worker_maximum_startup_concurrency", "Sweeps: each trial has several processes.", "`8`"),
    *(
        Variable(n, "For a worker that trains on a CPU: it keeps its memory between steps.", f"`{v}`")
        for n, v in WORKER_ENV.items()
    ),
    *(
        Variable(n, f"For a Ray that is started for one run{' or service' * (n in FRONT)}.", f"`{v}`")
        for n, v in LOCAL_RAY.items()
    ),
    *(
        Variable(n, "For a Ray that is started for one run on CPUs: its processes import early.", f"`{v}`")
        for n, v in PRELOAD.items()
    ),
    Variable("GPT_FOUNDRY_LIGHT", "Set for those of its processes that import nothing early."),
    *(Variable(n, "For vLLM's processes, unless it is set.", f"`{v}`") for n, v in VLLM_ENV.items()),
    Variable("OMP_NUM_THREADS", "For vLLM's processes on a CPU: compute threads.", "the setting `threads`"),
    Variable("PYTHONUNBUFFERED", "`make demo`: the service's lines appear as they are written.", "`1`"),
)

INTRODUCTION = f"""\
# Every setting

`{COMMAND}` writes this page from the code; a test keeps it up to date. [training.md](training.md) and
[serving.md](serving.md) explain how to use the settings.

- [Training](#training): flags of `python train_job/run.py`, and names in its YAML
- [Presets](#presets): named shapes with their recipes
- [The service](#the-service): `GPT_…` in the environment, or arguments of `serve_app:build_app`
- [Environment variables](#environment-variables): what this project reads, mentions, or sets"""

TRAINING = """\
## Training

A setting is `--batch-size 16` on the command line and `batch_size: 16` in the YAML file of `--config`; a switch is
`--compile` or `--no-compile` here and `compile: true` there. Flags override the YAML, which overrides the preset,
which overrides the default below. The default preset is `quick`. `none` empties a setting whose default is empty.
*Resume* marks settings that may change when a run is resumed (`--resume NAME`); the others decide a step's result."""

THE_PRESETS = """\
## Presets

`--preset NAME` selects a shape and a recipe. Other settings have the defaults from above."""

THE_SERVICE = """\
## The service

Set them in the environment, or as `key=value` after `serve_app:build_app`, which wins. `python -m serve_app.settings`
prints this table, too."""

ENVIRONMENT = """\
## Environment variables

Ours:"""
ENVIRONMENT_THEIRS = "Of the libraries, and read or mentioned here:"
ENVIRONMENT_SET = "Set for the libraries, unless already set:"


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, TRAINING]
    for title, group in groups():
        parts += [f"### {title}", training_table(group)]
    parts += [THE_PRESETS, preset_table(), THE_SERVICE, service.markdown()]
    parts += [ENVIRONMENT, variable_table(OURS, "Default"), ENVIRONMENT_THEIRS, variable_table(THEIRS, "Default")]
    parts += [ENVIRONMENT_SET, variable_table(SET, "Value")]
    return "\n\n".join(parts) + "\n"


def training_table(group: Iterable[Field[Any]]) -> str:
    """One row per setting of training."""
    hints = typing.get_type_hints(ModelConfig) | typing.get_type_hints(TrainConfig)
    rows = []
    for f in group:
        flag = f"--{f.name.replace('_', '-')}"
        shown = f"`{flag}`, `--no-{flag[2:]}`" if hints[f.name] is bool else f"`{flag}`"
        resumes = f.name in RESUMABLE - NAMES_THE_RUN
        rows.append([shown, _kind(f, hints[f.name]), _default(f), _help(f), "yes" if resumes else ""])
    return table(["Flag", "Type", "Default", "Meaning", "Resume"], rows)


def preset_table() -> str:
    """One row per preset: the shape with its size, and the recipe where it differs from the defaults."""
    titles = ["Preset", "Family", "Layers", "Heads", "Width", "Context", "Parameters"]
    titles += ["Tokenizer", "Optimizer", "Batch", "Ends after", "And"]
    units = {f.name: f.metadata["unit"] for f in fields(TrainConfig) if f.name in LIMITS}
    shown = {"family", "num_layers", "num_heads", "hidden_size", "context_length", "tokenizer", "optimizer"}
    shown |= {"batch_size"} | LIMITS
    rows = []
    for name in PRESETS:
        config = build_config({"preset": name})
        vocab_size = -(-parse_tokenizer(config.tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        shape = config.model_config(vocab_size)
        size = empty_model(shape).num_parameters() / 1e6
        ends = [f"{short_count(v)} {unit}" for limit, unit in units.items() if (v := getattr(config, limit))]
        rest = (MODEL_PRESETS[name] | PRESETS[name]).items()
        row = [f"`{name}`", shape.family, shape.num_layers, shape.num_heads, shape.hidden_size, shape.context_length]
        row += [f"{size:.1f} M", f"`{config.tokenizer}`", config.optimizer, config.batch_size, " or ".join(ends)]
        row += [", ".join(f"{key} {_spelt(value)}" for key, value in rest if key not in shown)]
        rows.append(row)
    return table(titles, rows)


def variable_table(variables: Iterable[Variable], default: str) -> str:
    """One row per environment variable."""
    rows = [[f"`{v.name.replace('*', '…')}`", v.help, v.default] for v in variables]
    return table(["Variable", "Meaning", default], rows)


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(hint: Any) -> Any:
    """A type without `| None`."""
    if not isinstance(hint, types.UnionType):
        return hint
    return next(option for option in typing.get_args(hint) if option is not types.NoneType)


def _kind(f: Field[Any], hint: Any) -> str:
    if choices := f.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in choices)
    kinds = {int: "whole number", float: "number", bool: "true or false", str: "text", tuple[str, ...]: "texts"}
    return kinds[_plain(hint)]


def _default(f: Field[Any]) -> str:
    return "" if f.default in (None, MISSING) else f"`{_spelt(f.default)}`"


def _spelt(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _help(f: Field[Any]) -> str:
    unit = f.metadata["unit"]
    return f.metadata["help"] + (f" [{unit}]" if unit else "")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(markdown(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(PAGE.parents[1])}")


if __name__ == "__main__":
    main()
