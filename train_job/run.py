"""The job: from a command line to a registered model. Parse, plan, launch, register, say what happened.

Runs alike as `python train_job/run.py`, through `ray job submit -- python train_job/run.py`, and with
`--working-dir .`. Exit codes: 0 done, 1 training failed (a full disk included), 2 the input was wrong, 130 or 143
stopped by a signal.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == ROOT / "train_job":  # run as a script: our modules are train_job.*, not top-level
    sys.path[0] = str(ROOT)
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new tables are printed whatever it is told
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # sweeps: what they write is in our own files
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # its INFO lines would stand between ours
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one more process, whose news nothing here reads
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for this poll, 2 s by default
if (Path.home() / ".ray" / "auth_token").exists():
    # Ray shows its token by itself only to a cluster that it found by itself; it looks when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")

from gptcore.errors import ConfigError, FoundryError, StorageFull, TrainingError  # noqa: E402
from gptcore.home import home  # noqa: E402
from gptcore.progress import FIRST_SECONDS, doing  # noqa: E402
from gptcore.redact import without_password  # noqa: E402
from train_job.cli import parse_settings  # noqa: E402
from train_job.cluster.connect import (  # noqa: E402
    ray_cluster,
    require_room,
    resources_per_worker,
    resources_text,
    torch_trainer,
    training_first,
    workers_text,
)
from train_job.config import TrainConfig, write_yaml  # noqa: E402
from train_job.files import storage_problem  # noqa: E402
from train_job.session.begin import begin  # noqa: E402
from train_job.session.console import Console, lasting_output, model_text  # noqa: E402
from train_job.session.history import History  # noqa: E402
from train_job.session.record import CONFIG, read_record, tracked_at, write_record  # noqa: E402
from train_job.session.stop import StopSignals  # noqa: E402
from train_job.session.whatnow import script_command  # noqa: E402
from train_job.training.events import Evaluation, Finished, Progress, Started  # noqa: E402
from train_job.training.storage import forget_rays_record, keep_record  # noqa: E402

if TYPE_CHECKING:
    from train_job.cluster.failures import Failure
    from train_job.data.inputs import Inputs
    from train_job.session.record import Begun
    from train_job.tracking.runs import DatasetUse


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""

    def job() -> int:
        given = parse_settings(sys.argv[1:] if argv is None else argv)
        with begin(given) as (config, run_dir):
            return Run(config, run_dir).execute()

    return answered(job)


def answered(job: Callable[[], int]) -> int:
    """The job's exit code; an error becomes one line, and 2 if it is the input's, 1 if the disk is full."""
    with lasting_output(), doing("getting ready"):
        return _answered(job)


def _answered(job: Callable[[], int]) -> int:
    try:
        return job()
    except (FoundryError, OSError) as error:
        problem = told(error, home())
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 1 if isinstance(problem, StorageFull) else 2
    except KeyboardInterrupt as stop:  # before anything was begun
        print("stopped", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def told(error: Exception, place: object) -> FoundryError | None:
    """The error as it is shown in one line, with `place` if it names none; None if it is not the user's to mend."""
    return error if isinstance(error, FoundryError) else storage_problem(error, getattr(error, "filename", "") or place)


def inputs_of(config: TrainConfig, cluster: Callable[[], Any], begun: Begun | None) -> Inputs:
    """What the run is made from; where much is to be tokenised, the cluster is started and does it.

    A run that goes on, and so has `begun`, wants the text that it has begun with.
    """
    from train_job.data.inputs import prepare_inputs

    def spread(fn: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        from train_job.cluster.ray_data import ray_map

        cluster()
        return ray_map(fn, items)

    return prepare_inputs(config, spread, refresh=begun is None, begun=begun)


def dataset_uses(inputs: Inputs) -> list[DatasetUse]:
    """The two splits, as MLflow is told of them."""
    from train_job.tracking.runs import DatasetUse

    return [
        DatasetUse(context, corpus.name, inputs.config.data, corpus.fingerprint, t.num_bytes, t.num_tokens)
        for context, corpus, t in (
            ("train", inputs.train_corpus, inputs.train),
            ("validation", inputs.validation_corpus, inputs.validation),
        )
    ]


NEWS_SECONDS = 45.0
"""Of silence before the driver wonders at workers that train: by then they have told what they are doing."""
LOST_SECONDS = 10.0
"""For Ray Train to notice what it has lost."""
LOOK_SECONDS = 1.0
"""How often the driver looks for news; on a small machine every look costs the worker a little."""


class Run:
    """One run from the driver's side: what was planned, the workers' news, and the outcome.

    `title` is what MLflow calls it, if not by its name; `tags` go there too.
    """

    def __init__(
        self, config: TrainConfig, run_dir: Path, title: str | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.title, self.tags = title or config.name, dict(tags or {})
        self.stops = StopSignals(self._stop)
        self.run_id = self.experiment_id = ""
        self.board: Any = None
        self.alone = False  # on a Ray of our own
        self.began: Started | None = None
        self.failure: Failure | None = None  # of workers that Ray has not started again yet
        self.finished: Finished | None = None
        self.result: Any = None
        self.problem: FoundryError | None = None

    def execute(self) -> int:
        """Plans, trains and registers. Raises FoundryError for wrong input, before anything is begun."""
        from train_job.session import outcome
        from train_job.tracking import client as tracking
        from train_job.tracking.registry import pin

        if ended := outcome.ended_with(self.run_dir, self.config):
            return outcome.show_again(self, *ended)
        record = read_record(self._record)
        self.uri = tracked_at(record)
        tracking.check_server(self.uri)
        if self.config.init_from:
            self.config = replace(self.config, init_from=pin(self.config.init_from, self.uri))
        with contextlib.ExitStack() as stack:
            # Wrong input should not have to wait for Ray: it starts when there is much to tokenise, or now.
            cluster = functools.cache(lambda: stack.enter_context(ray_cluster()))
            with doing("preparing the text"):
                self.inputs = inputs_of(self.config, cluster, record.text if record else None)
            self.config = self.inputs.config
            tracking.check_user(self.uri)
            ray, self.alone = cluster()
            self.resources = resources_per_worker(self.config, ray.nodes(), self.alone)
            if self.alone and not self.config.use_gpu:
                require_room(self.inputs.model, self.config.workers[0])
            self.console = Console(self.run_dir)
            stack.callback(self.console.close)
            stack.enter_context(self.stops)
            try:
                with doing("opening the run in MLflow"):
                    self.open()
                self.introduce(ray.nodes())
                for news in self.train(ray):
                    self.show(news)
                with doing("finishing the run"):
                    return outcome.conclude(self)
            except BaseException as error:
                # A signal to all of our process group ends Ray too, and then anything may be raised.
                if isinstance(error, KeyboardInterrupt) or self.stops.number:
                    outcome.end(self, "KILLED")
                    self.console.say(f"stopped; go on with: {self.resume_command()}")
                    outcome.what_now(self)
                    return 128 + self.stops.number
                if isinstance(error, (FoundryError, OSError)) and (problem := told(error, self.run_dir)):
                    return outcome.fail(self, problem)
                outcome.end(self, "FAILED")  # whatever it is, the run must not be left as running
                raise

    def _stop(self) -> None:
        """What a signal does at once; the rest happens where the run looks for it."""
        from train_job.session import outcome

        if self.board:
            self.board.ask_stop.remote()
        what = "saving a checkpoint" if self.board and self.began else "finishing what is in hand"
        self.console.say(f"stopping: {what} (once more to leave at once)")
        outcome.end(self, "KILLED")  # now: whoever stopped us may not wait

    def resume_command(self) -> str:
        """What goes on with this run."""
        default = self.config.storage_path == str(home() / "runs")
        storage = [] if default else ["--storage-path", str(self.config.storage_path)]
        return script_command("train_job/run.py", "--resume", str(self.config.name), *storage)

    @property
    def _record(self) -> Path:
        """The file that names the MLflow run, once there is one, and the objects that its text was read from."""
        return self.run_dir / "run.json"

    def open(self) -> None:
        """Opens the MLflow run, or goes on with the one that this folder names."""
        from gptcore.redact import without_password
        from train_job.tracking import runs as tracking
        from train_job.tracking.pages import NOTE

        self.history = History(self.run_dir / "history.jsonl")
        if self.history.damaged:
            self.console.say(f"{self.history.path}: {self.history.damaged} damaged lines were taken out")
        record = read_record(self._record)
        if record:
            self.run_id = record.run_id
            tracking.resume_run(self.uri, self.run_id)
            points = tracking.losses(self.uri, self.run_id)
            self.history.recall(points, self.config.batch_size * self.config.context, self.inputs.steps_per_epoch)
        else:
            inputs = self.inputs
            settings = self.config.flat()
            del settings["name"]  # it is the run's own, and would stand among what differs where runs are compared
            text = f"{inputs.train_corpus.name} ({inputs.train.num_bytes:,} bytes, {inputs.tokenizer.name})"
            tags = self.tags | {
                "tokenizer": inputs.tokenizer.fingerprint,
                NOTE: without_password(f"{self.label}; on {text}"),
            }
            if self.config.init_from:
                tags["parent"] = self.config.init_from
            self.run_id = tracking.start_run(
                self.uri,
                settings | {"tokenizer": inputs.tokenizer.name} | asdict(inputs.model),
                name=self.title,
                datasets=dataset_uses(inputs),
                tags=tags,
                experiment=self.config.experiment,
            )
        write_yaml(self.config, self.run_dir / CONFIG)  # before run.json: with it alone, a run can be resumed
        if not record:
            write_record(self._record, self.run_id, self.uri, self.inputs)
        with contextlib.suppress(TrainingError):  # for its address alone, no run ends
            self.experiment_id = tracking.experiment_of(self.uri, self.run_id)
        if "://" in str(self.config.storage_path):
            keep_record(str(self.config.storage_path), self.run_dir)

    @property
    def label(self) -> str:
        """What is trained, in a line."""
        from gptcore.hf_format import empty_model

        return model_text(self.config, self.inputs.model, empty_model(self.inputs.model).num_parameters())

    def introduce(self, nodes: list[dict[str, Any]]) -> None:
        """Says what is about to happen, before the first step."""

        c, i, say = self.config, self.inputs, self.console.say
        low, high = c.workers
        workers = str(low) if low == high else f"{low} to {high}"
        say(f"model     {without_password(self.label)}")
        say(f"text      {i.train_corpus.name}: {i.train.num_bytes:,} bytes, {i.train.num_tokens:,} tokens by")
        say(f"          {i.tokenizer.name}; {i.validation.num_bytes:,} bytes more are kept for validation")
        for note in i.notes:
            say(f"          {note}")
        say(f"workers   {workers}, each with {resources_text(self.resources)}")
        try:
            resources_per_worker(c, nodes, fixed=True)
        except ConfigError as error:
            say(f"waiting   for the cluster to grow: {error}")
        say(f"run       {c.name} ({self.run_id})")
        say(f"tracking  {without_password(self.uri)}")

    def train(self, ray: Any) -> Iterator[list[Any]]:
        """Runs Ray Train in a thread and yields the workers' news, if only an empty list, every LOOK_SECONDS.

        So the caller's thread can show progress and hear signals. In the end there is a `result` or a `problem`.
        """
        from train_job.cluster.board import Board
        from train_job.cluster.failures import last_line, why
        from train_job.cluster.worker import Job, train_worker

        forget_rays_record(self.config)
        inputs, config = self.inputs, self.config
        here = ray.get_runtime_context().get_node_id()
        board = ray.remote(Board).options(num_cpus=0, label_selector={ray._raylet.RAY_NODE_ID_KEY: here}).remote()
        initial = ray.put(inputs.parent.load_model().state_dict()) if inputs.parent else None
        job = Job(
            config,
            inputs.model,
            inputs.tokenizer,
            inputs.train_corpus,
            inputs.validation_corpus,
            initial,
            self.run_id,
            self.uri,
            self.run_dir,
            board,
        )
        trainer = torch_trainer(train_worker, job, self.resources)
        ended: list[Any] = []

        def fit() -> None:
            try:
                ended.append(trainer.fit())
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        self.stops.check()
        self.board = board
        thread.start()
        try:
            yield from self._follow(ray, board, thread)
            self.problem = ray.get(board.failed.remote())
        except ray.exceptions.RayError as error:  # the board is gone, and so is more: what Ray says of it comes first
            thread.join(LOST_SECONDS)
            ended = ended or [error]
        self.board = None
        if isinstance(ended[0], Exception):
            said = self.failure.why if self.failure else why(ended[0])
            full = storage_problem(RuntimeError(last_line(ended[0])), self.config.storage_path)
            lost = TrainingError(f"training failed: {said}; go on with: {self._next_try(said)}")
            self.problem = self.problem or full or lost
        else:
            self.result = ended[0]

    def _follow(self, ray: Any, board: Any, thread: threading.Thread) -> Iterator[list[Any]]:
        """The news while the thread runs, and what is left then."""
        training = False
        with doing(self._awaited) as wait:
            while thread.is_alive():
                yield ray.get(board.read.remote())
                before, training = training, bool(self.began and not self.failure)
                if training != before:
                    wait.due = NEWS_SECONDS if training else FIRST_SECONDS
                if not self.began:
                    self.stops.check()  # workers may be long in coming, and have nothing to save
                thread.join(LOOK_SECONDS)
        yield ray.get(board.read.remote())

    def _awaited(self) -> str:
        """What the driver waits for while workers are in hand."""
        if self.failure:
            return f"waiting for Ray to start the workers again: {self.failure.why}"
        if self.began:
            return "waiting for news of the workers"
        return (
            f"waiting for Ray to start {workers_text(*self.config.workers)}, with {resources_text(self.resources)} each"
        )

    def restarted(self, event: Started) -> str:
        """What Ray did, why, and from where the run goes on."""
        from train_job.cluster.failures import SMALLER

        why = self.failure.why if self.failure else "Ray has changed the number of workers"
        said = f"restarted from step {event.step} with {workers_text(event.workers)}: {why}"
        if SMALLER in why:
            said += f". If that goes on, stop the run and use: {self._next_try(why)}"
        return said

    def _next_try(self, why: str) -> str:
        """What goes on with a run that failed so, with half the memory for activations if that was what it lacked."""
        from train_job.cluster.failures import SMALLER

        config = self.config
        if SMALLER not in why:
            return self.resume_command()
        micro = config.micro_batch_size or math.ceil(config.batch_size / config.workers[1])
        return f"{self.resume_command()} --micro-batch-size {max(1, micro // 2)}"

    def show(self, news: list[Any]) -> None:
        """Tells the user, and keeps what the loss curve is drawn from."""
        from train_job.cluster.failures import Failure

        for event in news:
            if isinstance(event, str):
                self.console.say(event)
            elif isinstance(event, Failure):
                self.failure = event
            elif isinstance(event, Started):
                if self.alone:
                    training_first()
                if self.began:
                    self.console.say(self.restarted(event))
                elif event.step:
                    self.console.say(f"resumed   from step {event.step}")
                self.began, self.failure = self.began or event, None
            elif isinstance(event, Progress):
                self.console.progress(event)
                self.history.add(event)
            elif isinstance(event, Evaluation):
                self.console.evaluation(event, "the parent" if self.config.init_from else "before training")
                self.history.add(event)
            elif isinstance(event, Finished):
                self.finished = event


if __name__ == "__main__":
    sys.exit(main())
