"""MLflow's pages of what was trained: what they say and show first, and their addresses.

In: names and ids. Out: tags that MLflow's UI reads, texts, and the part of an address behind the server's. By these
tags the UI opens an experiment as model training, with a description, and offers a view with loss and bits per byte
among the columns. The UI itself keeps everything else about its looks in the browser.
"""

import json

UI = "http://127.0.0.1:5000"
"""Where `make ui` listens."""
KIND, NOTE = "mlflow.experimentKind", "mlflow.note.content"
TRAINING = "custom_model_development"
GUESSED = ("no_inferred_type", "_inferred")
"""How a kind ends that the UI has guessed and nobody chose."""
VIEW = "gpt-foundry"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = ("metrics.`val/bits_per_byte`", "metrics.`val/loss`", "metrics.`train/loss`", "params.`preset`")
"""What the view shows beside a run's name, time and duration; more would be beyond the edge of a usual window."""


def experiment_tags(experiment_id: str, has: dict[str, str], created_ms: int) -> dict[str, str]:
    """What an experiment's tags lack, if it `has` these. What a user has written stays; what the UI guessed does not.

    `created_ms` is the experiment's own time, in milliseconds: the tags of one experiment are always the same.
    """
    wanted = {KIND: TRAINING, NOTE: experiment_note(experiment_id), VIEW_TAG: saved_view(created_ms)}
    return {key: value for key, value in wanted.items() if key not in has or (key == KIND and is_guess(has[key]))}


def is_guess(kind: str) -> bool:
    """Whether an experiment's kind is what the UI guessed."""
    return kind.endswith(GUESSED)


def experiment_note(experiment_id: str) -> str:
    """The experiment's description, in Markdown."""
    return (
        "Language models trained by GPT Foundry, a run each; a sweep has its trials below it. "
        f"[Runs with loss and bits per byte](#{experiment_page(experiment_id)}) compares them.\n\n"
        "- `val/bits_per_byte` compares models whatever their tokenizers: lower is better. `val/loss` and "
        "`train/loss` are in nats per token.\n"
        "- A run's figures, samples, settings and log are among its artifacts.\n"
        "- Its best checkpoint is a version of the registered model; `@champion` is the best of them so far."
    )


def model_note(name: str) -> str:
    """The registered model's description, in Markdown."""
    return (
        "Language models trained by GPT Foundry, a version for each run. `@champion` is the version with the fewest "
        "bits per byte on its validation text; a service of "
        f"`models:/{name}@champion` follows it. A version's tags say what it scored, on which text, and why it was "
        "promoted or not."
    )


def saved_view(created_ms: int) -> str:
    """The view of the runs' table, as the UI keeps it in a tag."""
    state = {"selectedColumns": COLUMNS}
    view = {"name": "Loss and bits per byte", "createdAt": created_ms, "updatedAt": created_ms}
    return json.dumps(view | {"state": json.dumps(state)})


def experiment_page(experiment_id: str) -> str:
    """The experiment's runs in that view; what follows `http://HOST:PORT/#`."""
    return f"/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The run's page; what follows `http://HOST:PORT/#`."""
    return f"/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
