"""What a run tells MLflow, in a way that an outage of the tracking server cannot hurt.

In: a run's settings, datasets, metric points and files. Out: one MLflow run that holds each of them once. Settings go
straight to the server, which must be up when a run starts; points and files go through a `Spool`: a file on disk that
a background thread delivers in order, for as long as it takes. What is left when a process ends is delivered by
`python -m train_job.tracking deliver FOLDER`. MLflow is imported inside functions, since importing it takes seconds.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptcore.errors import FoundryError, RecordError, TrainingError
from gptcore.home import checkout, home
from gptcore.redact import without_password
from train_job.files import read_json
from train_job.tracking import pages
from train_job.tracking.spool import (
    Spool,
    answers_expected,
    deliver_batch,
    impatient_requests,
    mlflow_client,
    undelivered,
)

log = logging.getLogger(__name__)

PARAMS_PER_BATCH = 100  # the most that MLflow takes at once
PEAK = "system/peak_mb"
"""How the metrics of peak memory (MiB) begin: MLflow's UI has its charts of system metrics last."""
DIGEST_LENGTH = 32  # MLflow refuses a dataset digest of more than 36 characters


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else the embedded sqlite database; absolute, since Ray's workers change folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def artifact_root(uri: str) -> str | None:
    """Where a run's files go when no server decides: beside an sqlite database, else under home(). A file:// URI."""
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https") or scheme.startswith("databricks"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).parent if scheme == "sqlite" else home() / "mlflow"
    return (folder / "artifacts").absolute().as_uri()


def _check_sqlite(path: Path) -> None:
    """Makes the database's folder; raises OSError if something else is where the database should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise OSError(f"{path} is a folder, expected a file")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise OSError(f"{path} is not an SQLite database")


def _check_database(uri: str, timeout_s: float) -> None:
    """Raises OSError if the database behind an open port takes no connection within the time."""
    from sqlalchemy import create_engine, pool
    from sqlalchemy.exc import SQLAlchemyError

    said: list[str] = []

    def connect() -> None:
        try:
            create_engine(uri, poolclass=pool.NullPool).connect().close()
            said.append("")
        except (SQLAlchemyError, ImportError) as error:
            said.append(" ".join(str(getattr(error, "orig", None) or error).split()))

    asking = threading.Thread(target=connect, daemon=True)  # drivers have time limits of different names
    asking.start()
    asking.join(timeout_s)
    if not said:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if said[0]:
        raise OSError(said[0])


def check_server(uri: str, timeout_s: float = 5.0) -> None:
    """Raises TrainingError, within about `timeout_s` seconds, if nothing answers at the tracking URI."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            host = parts.netloc.rpartition("@")[2]
            health = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health"
            with contextlib.closing(urllib.request.urlopen(health, timeout=timeout_s)):
                return
        if parts.scheme == "sqlite":
            _check_sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
        elif parts.hostname:
            port = parts.port or {"mysql": 3306, "mssql": 1433}.get(parts.scheme.partition("+")[0], 5432)
            socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
            _check_database(uri, timeout_s)
        elif not parts.scheme.startswith("databricks"):
            raise TrainingError(
                f"tracking URI {without_password(uri)!r} is of no known kind; expected http(s)://… or sqlite:///…"
            )
    except urllib.error.HTTPError as error:  # it answers: an older server or a gateway without /health will do
        if error.code >= 500:
            raise TrainingError(
                f"the tracking server at {without_password(uri)} answers {error.code} {error.reason}"
            ) from error
    except (OSError, ValueError) as error:
        # A ValueError is the URL's parser's, which quotes what it stumbled over: it may be part of a password.
        reason = "it is no valid URL" if isinstance(error, ValueError) else getattr(error, "reason", None) or error
        raise TrainingError(
            f"no tracking server answers at {without_password(uri)} ({without_password(str(reason))}); "
            "start it, correct MLFLOW_TRACKING_URI, or unset that to use the embedded database"
        ) from error


def check_user(uri: str) -> None:
    """Raises TrainingError if a tracking server does not let this environment's user in."""
    if urlsplit(uri).scheme in ("http", "https"):
        with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
            mlflow_client(uri).search_experiments(max_results=1)


@dataclass(frozen=True)
class DatasetUse:
    """One split as the run used it. `context` is "train" or "validation", `source` a path, URL or corpus name."""

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
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
        from mlflow.entities import Param

        client = mlflow_client(uri)
        all_tags = source_tags() | hardware_tags() | dict(tags or {})
        run = client.create_run(_experiment_id(client, uri, experiment), run_name=name, tags=all_tags)
        run_id: str = run.info.run_id
        try:
            params = [Param(key, str(value)) for key, value in _flat(config)]
            for i in range(0, len(params), PARAMS_PER_BATCH):
                client.log_batch(run_id, params=params[i : i + PARAMS_PER_BATCH])
            client.log_inputs(run_id, [_dataset_input(use) for use in datasets])
        except Exception:
            with contextlib.suppress(Exception):  # the first problem is the one to tell
                client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def resume_run(uri: str, run_id: str) -> None:
    """Marks the run as running again. Raises TrainingError if it cannot be found or the server does not answer."""
    check_server(uri)
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
        mlflow_client(uri).update_run(run_id, status="RUNNING")


def losses(uri: str, run_id: str) -> dict[str, dict[int, float]]:
    """The run's loss curve as MLflow has it: values by step, under the names of `train_job.session.history`."""
    names = {"train_loss": "train/loss", "val_loss": "val/loss", "bits_per_byte": "val/bits_per_byte"}
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
        client = mlflow_client(uri)
        return {
            ours: {point.step: point.value for point in client.get_metric_history(run_id, name)}
            for ours, name in names.items()
        }


def finish_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Closes the run as FINISHED, FAILED or KILLED, unless it is. Waits about a minute for a server that is away."""
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=5):
        client = mlflow_client(uri)
        if client.get_run(run_id).info.status != status:  # its end would be now
            client.set_terminated(run_id, status)


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a run. Raises TrainingError if the server is away."""
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=5):
        client = mlflow_client(uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)


def experiment_of(uri: str, run_id: str) -> str:
    """The id of the run's experiment. Raises TrainingError if the server does not answer or has no such run."""
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
        return str(mlflow_client(uri).get_run(run_id).info.experiment_id)


def experiment_pages(uri: str, ui: str) -> list[tuple[str, str]]:
    """Each experiment that has runs, and its page on the server, or on the `ui` beside a database; the latest first."""
    base = without_password(uri).rstrip("/") if urlsplit(uri).scheme in ("http", "https") else ui.rstrip("/")
    check_server(uri)
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=3):
        client = mlflow_client(uri)
        found = client.search_experiments(order_by=["last_update_time DESC"])
        used = [one for one in found if client.search_runs([one.experiment_id], max_results=1)]
        return [(one.name, f"{base}/#{pages.experiment_page(one.experiment_id)}") for one in used]


def _experiment_id(client: Any, uri: str, name: str) -> str:
    """The experiment of that name, made if there is none, with the tags that its page wants."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        experiment = client.get_experiment(client.create_experiment(name, artifact_location=artifact_root(uri)))
    if experiment.lifecycle_stage != "active":
        raise TrainingError(
            f"experiment {name!r} is deleted; choose another one, or bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    found = str(experiment.experiment_id)
    for key, value in pages.experiment_tags(found, experiment.tags, int(experiment.creation_time or 0)).items():
        with contextlib.suppress(Exception):  # a user who may add runs need not be one who may edit the experiment
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
    """Who runs what: MLflow's user and source tags, the git commit, and whether the checkout differs from it."""
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags

    # MLflow's own git tags name the remote's URL, password included, and look beside the main file only.
    tags: dict[str, str] = resolve_tags(ignore=[GitRunContext])  # type: ignore[list-item]  # it wants the class
    beside_us = Path(__file__).resolve().parents[2]
    for folder in (beside_us, checkout()):
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
    """This machine: CPU model, cores, GPUs, and the versions of Python and torch."""
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
    """Spools what MLflow's own monitors see (CPU, memory, disk, network, GPUs) as "system/…" until `stop()`.

    Their step is the run's age in whole seconds, so that a resumed run's go on behind the earlier ones.
    """

    def __init__(self, spool: Spool, interval_s: float = 10.0) -> None:
        self._spool, self._interval_s = spool, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; call it before the spool is closed."""
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
            except Exception as error:  # a figure about the machine is not worth a run
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


def deliver(folder: Path) -> int:
    """Sends what a finished or killed process left in its spool; returns the number of lines sent.

    Raises TrainingError if `folder` is no spool or the server does not answer.
    """
    if not (folder / "spool.json").exists():
        raise TrainingError(f"{folder} is no spool: it has no spool.json; expected the spool folder of a run")
    spool = read_json(folder / "spool.json", "put there what the run's run.json has: run_id and tracking_uri")
    if not {"run_id", "tracking_uri"} <= spool.keys():
        raise RecordError(f"{folder / 'spool.json'} lacks run_id or tracking_uri; the run's run.json has both")
    waiting, uri = undelivered(folder), tracking_uri()
    if without_password(uri) != spool["tracking_uri"]:  # else the environment's, which may have a password
        uri = str(spool["tracking_uri"])
    check_server(uri)
    with answers_expected(uri), impatient_requests(timeout_s=30, retries=2):
        client = mlflow_client(uri)
        while deliver_batch(folder, spool["run_id"], client):
            pass
    return waiting


def main(arguments: list[str] | None = None) -> int:
    """`deliver FOLDER` sends what a run left behind; `uri` and `pages` say where MLflow is. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train_job.tracking", description="Where runs are tracked.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("uri", help="print the tracking URI that runs use")
    page = commands.add_parser("pages", help="print the addresses of the experiments' pages")
    page.add_argument(
        "--ui", default=pages.UI, metavar="URL", help="where MLflow's UI is, for a database (%(default)s)"
    )
    command = commands.add_parser("deliver", help="send a spool's remaining points and files to MLflow")
    command.add_argument("folder", type=Path, help="the spool's folder")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "uri":
            check_server(tracking_uri())  # makes the folder of the embedded database
            print(tracking_uri())
        elif asked.command == "pages":
            for name, address in experiment_pages(tracking_uri(), asked.ui):
                print(f"{name}  {address}")
        else:
            print(f"delivered {deliver(asked.folder)} lines; nothing is left")
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
