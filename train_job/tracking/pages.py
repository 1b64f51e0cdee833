"""MLflow's pages: their descriptions, their columns and their URLs.

In: names and ids. Out: tags that MLflow's UI reads, texts, and the part of a URL after the server's. With these tags
the UI opens an experiment as model training, with a description and a view that has columns for loss and bits per
byte. The UI stores all other display settings in the browser.
"""

import json

UI = "http://127.0.0.1:5000"
"""The address of `make ui`."""
KIND, NOTE = "mlflow.experimentKind", "mlflow.note.content"
TRAINING = "custom_model_development"
GUESSED = ("no_inferred_type", "_inferred")
"""Endings of an experiment kind that the UI guessed."""
VIEW = "gpt-foundry"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = ("metrics.`val/bits_per_byte`", "metrics.`val/loss`", "metrics.`train/loss`", "params.`preset`")
"""The view's columns besides a run's name, time and duration; more would not fit a usual window."""


def experiment_tags(experiment_id: str, has: dict[str, str], created_ms: int) -> dict[str, str]:
    """The tags to add to an experiment that `has` some already. A user's own stay; what the UI guessed is replaced.

    `created_ms` is the experiment's creation time in milliseconds, so the tags of one experiment never change.
    """
    wanted = {KIND: TRAINING, NOTE: experiment_note(experiment_id), VIEW_TAG: saved_view(created_ms)}
    return {key: value for key, value in wanted.items() if key not in has or (key == KIND and is_guess(has[key]))}


def is_guess(kind: str) -> bool:
    """Whether the UI guessed this experiment kind."""
    return kind.endswith(GUESSED)


def experiment_note(experiment_id: str) -> str:
    """The experiment's description, in Markdown."""
    return (
        "Language models trained by GPT Foundry, one run each; the trials of a sweep are below it. "
        f"[This view](#{experiment_page(experiment_id)}) compares them by loss and bits per byte.\n\n"
        "- `val/bits_per_byte` compares models with any tokenizers: lower is better. `val/loss` and "
        "`train/loss` are in nats per token.\n"
        "- A run's figures, samples, settings and log are among its artifacts.\n"
        "- Its best checkpoint is a version of the registered model; `@champion` is the best version so far."
    )


def model_note(name: str) -> str:
    """The registered model's description, in Markdown."""
    return (
        "Language models trained by GPT Foundry, one version per run. `@champion` is the version with the fewest "
        "bits per byte on its validation text; a service of "
        f"`models:/{name}@champion` follows it. A version's tags have its score, the text, and why it was "
        "promoted or not."
    )


def saved_view(created_ms: int) -> str:
    """The view of the runs' table, in the format of the UI's tag."""
    state = {"selectedColumns": COLUMNS}
    view = {"name": "Loss and bits per byte", "createdAt": created_ms, "updatedAt": created_ms}
    return json.dumps(view | {"state": json.dumps(state)})


def experiment_page(experiment_id: str) -> str:
    """The path of the experiment's runs in that view, after `http://HOST:PORT/#`."""
    return f"/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The path of the run's page, after `http://HOST:PORT/#`."""
    return f"/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
