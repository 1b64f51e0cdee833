"""Reads what a job has written to its folder and to MLflow."""

import json
from typing import Any

import torch
from safetensors.torch import load_file

from tests.system.conftest import Job


def mlflow_client(job: Job) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(job.uri)


def run_id(job: Job) -> str:
    return str(json.loads((job.run_dir / "run.json").read_text())["run_id"])


def points(job: Job, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow_client(job).get_metric_history(run_id(job), key)]


def artifacts(job: Job, folder: str = "") -> list[str]:
    return [a.path for a in mlflow_client(job).list_artifacts(run_id(job), folder)]


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.run_dir / "package" / "model.safetensors")


def status(job: Job) -> str:
    return str(mlflow_client(job).get_run(run_id(job)).info.status)


def versions(job: Job, model: str = "gpt") -> list[Any]:
    return [v for v in mlflow_client(job).search_model_versions(f"name='{model}'") if v.run_id == run_id(job)]
