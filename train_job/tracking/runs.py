"""MLflow runs: opened, resumed, tagged and closed; their parameters, datasets and system metrics.

In: a run's settings and datasets, and the machine. Out: one MLflow run. These calls go straight to the server, which
must answer when a run starts; metric points and files go through a `Spool` instead. Importing MLflow takes seconds, so
it is imported inside functions.
"""

import contextlib
import json
import logging
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptcore.errors import TrainingError
from gptcore.home import checkout
from gptcore.redact import without_password
from train_job.tracking import pages
from train_job.tracking.client import artifact_root, check_server, connected, mlflow_client
from train_job.tracking.spool import Spool

log = logging.getLogger(__name__)

PARAMS_PER_BATCH = 100  # MLflow's limit
PEAK = "system/peak_mb"
"""Prefix of the peak-memory metrics (MiB); MLflow's UI shows system metrics last."""
DIGEST_LENGTH = 32  # MLflow allows at most 36 characters


@dataclass(frozen=True)
class DatasetUse:
    """One split of the run's text. `context` is "train" or "validation", `source` a path, URL or corpus name."""

    context: str
    name: str
    source: str
    fingerprint: str
    num_bytes: int
    num_tokens: int


def start_run(
    uri: str,
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    datasets: Iterable[DatasetUse] = (),
    tags: Mapping[str, str] | None = None,
    experiment: str = "gpt",
) -> str:
    """Opens a run with `config` (nested dicts become dotted names) as parameters; returns its id.

    Raises TrainingError if the server does not answer or refuses.
    """
    check_server(uri)
    with connected(uri) as client:
        from mlflow.entities import Param

        all_tags = source_tags() | hardware_tags() | dict(tags or {})
        run = client.create_run(_experiment_id(client, uri, experiment), run_name=name, tags=all_tags)
        run_id: str = run.info.run_id
        try:
            params = [Param(key, str(value)) for key, value in _flat(config)]
            for i in range(0, len(params), PARAMS_PER_BATCH):
                client.log_batch(run_id, params=params[i : i + PARAMS_PER_BATCH])
            client.log_inputs(run_id, [_dataset_input(use) for use in datasets])
        except Exception:
            with contextlib.suppress(Exception):  # report the first error, not this one
                client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def resume_run(uri: str, run_id: str) -> None:
    """Marks the run as running again. Raises TrainingError if it cannot be found or the server does not answer."""
    check_server(uri)
    with connected(uri) as client:
        client.update_run(run_id, status="RUNNING")


def losses(uri: str, run_id: str) -> dict[str, dict[int, float]]:
    """The run's loss curve from MLflow: values by step, under the names of `train_job.session.history`."""
    names = {"train_loss": "train/loss", "val_loss": "val/loss", "bits_per_byte": "val/bits_per_byte"}
    with connected(uri) as client:
        return {
            ours: {point.step: point.value for point in client.get_metric_history(run_id, name)}
            for ours, name in names.items()
        }


def finish_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Ends the run as FINISHED, FAILED or KILLED. Waits about a minute for a server that is away."""
    with connected(uri, retries=5) as client:
        if client.get_run(run_id).info.status != status:  # else its end time would change
            client.set_terminated(run_id, status)


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a run. Raises TrainingError if the server is away."""
    with connected(uri, retries=5) as client:
        for key, value in tags.items():
            client.set_tag(run_id, key, value)


def experiment_of(uri: str, run_id: str) -> str:
    """The id of the run's experiment. Raises TrainingError if the server does not answer or has no such run."""
    with connected(uri) as client:
        return str(client.get_run(run_id).info.experiment_id)


def experiment_pages(uri: str, ui: str) -> list[tuple[str, str]]:
    """Experiments that have runs, latest first, and their pages' URLs; `ui` is MLflow's UI if there is no server."""
    base = without_password(uri).rstrip("/") if urlsplit(uri).scheme in ("http", "https") else ui.rstrip("/")
    check_server(uri)
    with connected(uri) as client:
        found = client.search_experiments(order_by=["last_update_time DESC"])
        used = [one for one in found if client.search_runs([one.experiment_id], max_results=1)]
        return [(one.name, f"{base}/#{pages.experiment_page(one.experiment_id)}") for one in used]


def _experiment_id(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, which is created if it does not exist; sets the tags that its page needs."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        experiment = client.get_experiment(client.create_experiment(name, artifact_location=artifact_root(uri)))
    if experiment.lifecycle_stage != "active":
        raise TrainingError(
            f"experiment {name!r} is deleted; choose another one, or restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    found = str(experiment.experiment_id)
    for key, value in pages.experiment_tags(found, experiment.tags, int(experiment.creation_time or 0)).items():
        with contextlib.suppress(Exception):  # the user may lack the right to edit the experiment
            client.set_experiment_tag(found, key, value)
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dataset_input(use: DatasetUse) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    scheme = urlsplit(use.source).scheme if "://" in use.source else ""
    web = scheme in ("http", "https")
    profile = {"bytes": use.num_bytes, "tokens": use.num_tokens, "fingerprint": use.fingerprint}
    dataset = Dataset(
        name=use.name,
        digest=use.fingerprint[:DIGEST_LENGTH],
        source_type="http" if web else scheme or "local",
        source=json.dumps({"url" if web else "uri": use.source}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, use.context)])


def source_tags() -> dict[str, str]:
    """MLflow's user and source tags, the git commit, and whether the checkout has changes."""
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags

    # MLflow's own git tags contain the remote's URL with its password, and only look in the main file's folder.
    tags: dict[str, str] = resolve_tags(ignore=[GitRunContext])  # type: ignore[list-item]  # it expects the class
    our_checkout = Path(__file__).resolve().parents[2]
    for folder in (our_checkout, checkout()):
        if folder and (folder / ".git").exists() and (commit := _git(folder, "rev-parse", "HEAD")):
            dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
            return tags | {"mlflow.source.git.commit": commit, "git.dirty": str(dirty).lower()}
    return tags


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware_tags() -> dict[str, str]:
    """Tags of this machine: CPU model, cores, GPUs, and the versions of Python and torch."""
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            cpu = model[1]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware.cpu": cpu,
        "hardware.cores": str(os.cpu_count()),
        "hardware.gpus": ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in sorted(set(gpus))) or "none",
        "version.python": platform.python_version(),
        "version.torch": torch.__version__,
    }


class SystemMetrics:
    """Logs the figures of MLflow's monitors (CPU, memory, disk, network, GPUs) as "system/…" until `stop()`.

    Their step is the run's age in whole seconds, so that a resumed run's figures follow the earlier ones.
    """

    def __init__(self, spool: Spool, interval_s: float = 10.0) -> None:
        self._spool, self._interval_s = spool, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; call this before closing the spool."""
        self._stopped.set()
        self._thread.join(self._interval_s)

    def _watch(self) -> None:
        monitors, started = _monitors(), None
        while not self._stopped.wait(self._interval_s):
            try:
                started = started or mlflow_client(self._spool.tracking_uri).get_run(self._spool.run_id).info.start_time
                values: dict[str, float] = {}
                for monitor in monitors:
                    monitor.collect_metrics()
                    values |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
                if not self._stopped.is_set():
                    self._spool.metrics(int(time.time() - started / 1000), values)
            except Exception as error:  # system metrics must not end a run
                log.debug("no system metrics this time: %s", without_password(str(error)))


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no GPU, no NVML, a sandbox without counters
            monitors.append(kind())
    return monitors
