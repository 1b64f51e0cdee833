"""A spool of metric points and files for MLflow: a file on disk that a background thread delivers.

In: metric points and file names, from a training loop that must not wait. Out: the same in MLflow, each once and in
order, even if the server is away for long or the process dies. What is left when a process ends is delivered by
`python -m train_job.tracking deliver FOLDER`.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptcore.errors import RecordError, TrainingError
from gptcore.files import sync
from gptcore.home import default_tracking_uri
from gptcore.redact import without_password
from train_job.files import read_json, storage_problem, write_json
from train_job.tracking.client import check_server, connected, mlflow_client, request_limits

log = logging.getLogger(__name__)

POINTS_PER_BATCH = 1000  # MLflow's limit for one log_batch
DELIVERY_INTERVAL_S = 5.0  # between batches: a request per step would slow training
LONGEST_BACKOFF_S = 15.0
FILE_KEYS = {"artifact", "to", "table"}


@dataclass
class _Progress:
    """How much of a spool is delivered: a byte offset, and the steps the server had before the first delivery."""

    offset: int = 0
    floor: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> "_Progress | None":
        """None before the first delivery, or if the file is damaged; then the server is asked for its steps again."""
        try:
            progress = _Progress(**json.loads((folder / "delivered.json").read_bytes()))
            return progress if isinstance(progress.offset, int) and isinstance(progress.floor, dict) else None
        except (OSError, TypeError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        write_json(folder / "delivered.json", asdict(self))


def _read_lines(folder: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Each complete line of the spool from `offset` on, and the offset of its end; skips damaged lines."""
    path = folder / "lines.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):  # still being written, or cut off by a crash
                return
            offset += len(raw)
            if line := _line(raw):
                yield line, offset


def _line(raw: bytes) -> dict[str, Any] | None:
    """Parses a line; None if it is neither points nor a file."""
    with contextlib.suppress(ValueError):
        line = json.loads(raw)
        if isinstance(line, dict) and any(keys <= line.keys() for keys in ({"step", "time", "values"}, FILE_KEYS)):
            return line
    return None


def undelivered(folder: Path) -> int:
    """The number of lines that are not delivered yet."""
    progress = _Progress.read(folder) or _Progress()
    return sum(1 for _ in _read_lines(folder, progress.offset))


def deliver_batch(folder: Path, run_id: str, client: Any) -> bool:
    """Sends the next points, or the next file; returns False if all is sent. Raises what MLflow raises.

    After a crash between sending and recording the progress, a batch is sent again, which changes nothing: a point's
    timestamp is the time it was spooled, and MLflow stores identical points once; a file replaces itself.
    """
    from mlflow.exceptions import MlflowException

    progress = _Progress.read(folder)
    if progress is None:  # recorded before anything is sent, so that it excludes our own points
        held = client.get_run(run_id).data.to_proto().metrics  # `data.metrics` lacks the steps
        progress = _Progress(floor={metric.key: metric.step for metric in held})
        progress.write(folder)
    lines: list[dict[str, Any]] = []
    points = 0
    for line, end in _read_lines(folder, progress.offset):
        points += len(line.get("values", ()))
        if lines and (points > POINTS_PER_BATCH or "artifact" in line):
            break
        lines.append(line)
        progress.offset = end
        if "artifact" in line:
            break
    if not lines:
        return False
    try:
        _send(lines, progress.floor, run_id, client)
    except MlflowException as error:
        if error.get_http_status_code() != 400:  # any error but bad input may be temporary
            raise
        log.warning(
            "MLflow refused %d lines, kept in %s: %s",
            len(lines),
            folder / "refused.jsonl",
            without_password(str(error)),
        )
        with (folder / "refused.jsonl").open("a") as refused:
            refused.writelines(json.dumps(line) + "\n" for line in lines)
    progress.write(folder)
    return True


def _send(lines: list[dict[str, Any]], floor: dict[str, int], run_id: str, client: Any) -> None:
    from mlflow.entities import Metric

    if "artifact" in lines[0]:
        return _send_file(lines[0], run_id, client)
    metrics = [
        Metric(key, value, line["time"], line["step"])
        for line in lines
        for key, value in line["values"].items()
        if line["step"] > floor.get(key, -1)
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
    return None


def _send_file(line: dict[str, Any], run_id: str, client: Any) -> None:
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    path = Path(line["artifact"])
    if not path.exists():
        log.warning("%s no longer exists, so it is not logged to MLflow", path)
        return
    client.log_artifact(run_id, str(path), line["to"])
    if line["table"]:  # the tag that MLflow's log_table sets, so that the UI shows a table
        entry = {"path": f"{line['to']}/{path.name}" if line["to"] else path.name, "type": "table"}
        tables = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if entry not in tables:
            client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))


class Spool:
    """Delivers a run's points and files to MLflow. One writer process per folder; no call waits for the server.

    A resumed run opens the same folder again, or an empty one. Steps of a metric that were spooled before, or that the
    server has, are dropped: repeating the steps since the last checkpoint logs nothing twice.
    Writing raises TrainingError if the disk is full or not writable.
    """

    def __init__(self, folder: Path, run_id: str, tracking_uri: str) -> None:
        self.folder, self.run_id, self.tracking_uri = Path(folder).absolute(), run_id, tracking_uri
        write_json(self.folder / "spool.json", {"run_id": run_id, "tracking_uri": without_password(tracking_uri)})
        self._last_step: dict[str, int] = {}
        whole = 0
        for line, end in _read_lines(self.folder):
            self._last_step.update(dict.fromkeys(line.get("values", ()), line.get("step", 0)))
            whole = end
        self._file = (self.folder / "lines.jsonl").open("a")
        self._file.truncate(whole)  # removes a line cut off by a crash
        self._lock = threading.Lock()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow-spool", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs `values` at `step`; drops those already logged at this step or a later one."""
        with self._lock:
            fresh = {key: float(value) for key, value in values.items() if step > self._last_step.get(key, -1)}
            if fresh:
                self._append({"step": step, "time": int(time.time() * 1000), "values": fresh})
                self._last_step.update(dict.fromkeys(fresh, step))

    def artifact(self, local_file: Path, artifact_path: str | None = None, table: bool = False) -> None:
        """Logs a file, as it is when delivered, in the folder `artifact_path`; `table`: the UI shows it as one."""
        with self._lock:
            self._append({"artifact": str(Path(local_file).absolute()), "to": artifact_path, "table": table})

    def sync(self) -> None:
        """Waits until every line so far is on the disk, where it survives a power cut. Blocks no other call."""
        with self._explained():
            sync(self._file)

    def close(self, timeout_s: float = 30.0) -> int:
        """Delivers the rest for at most `timeout_s` seconds; returns the number of undelivered lines."""
        self._closing.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        with self._lock:
            self._file.close()
        return undelivered(self.folder)

    def _append(self, line: dict[str, Any]) -> None:
        with self._explained():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = storage_problem(error, self.folder)
            raise (problem or TrainingError(f"cannot write metrics to {self.folder}: {error.strerror}")) from error

    def _deliver(self) -> None:
        pause, away = DELIVERY_INTERVAL_S, False
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            try:
                while not self._abandoned.is_set() and self._deliver_batch():
                    pass
                if closing:
                    return
                if away:
                    log.info("MLflow at %s is back; nothing was lost", without_password(self.tracking_uri))
                pause, away = DELIVERY_INTERVAL_S, False
            except Exception as error:  # training goes on; the next attempt may succeed
                if not away:
                    log.warning("MLflow is away, metrics wait in %s (%s)", self.folder, without_password(str(error)))
                pause, away = min(2 * pause, LONGEST_BACKOFF_S), True
            if closing:
                self._abandoned.wait(1.0)
            else:
                self._closing.wait(pause)

    def _deliver_batch(self) -> bool:
        with request_limits(timeout_s=10, retries=0):
            return deliver_batch(self.folder, self.run_id, mlflow_client(self.tracking_uri))


def deliver(folder: Path) -> int:
    """Delivers the rest of a finished or killed process's spool; returns the number of lines sent.

    Raises TrainingError if `folder` is not a spool or the server does not answer.
    """
    if not (folder / "spool.json").exists():
        raise TrainingError(f"{folder} is not a spool: it has no spool.json; expected the spool folder of a run")
    spool = read_json(folder / "spool.json", "write run_id and tracking_uri to it, as in the run's run.json")
    if not {"run_id", "tracking_uri"} <= spool.keys():
        raise RecordError(f"{folder / 'spool.json'} lacks run_id or tracking_uri; the run's run.json has both")
    waiting, uri = undelivered(folder), default_tracking_uri()
    if without_password(uri) != spool["tracking_uri"]:  # the environment's may have a password
        uri = str(spool["tracking_uri"])
    check_server(uri)
    with connected(uri, retries=2) as client:
        while deliver_batch(folder, spool["run_id"], client):
            pass
    return waiting
