"""The sweep: many trials of one recipe, poor ones stopped early, the best one registered.

    python train_job/sweep.py train_job/sweeps/quick.yaml --data notes.txt

In: a YAML file (its keys are the fields of `train_job.sweeps.space.SweepConfig`) and flags, those of run.py included.
Out: a parent run in MLflow with one run per trial below it, a table, and a version of the best trial's model. Ray Tune
runs a few trials at a time. Their state is in their folders, so a sweep that was stopped can be resumed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == ROOT / "train_job":  # run as a script: our modules are train_job.*, not top-level
    sys.path[0] = str(ROOT)

import train_job.environment  # noqa: E402, F401, I001  # first: it sets what libraries read when they are imported
from gptcore.errors import ConfigError, FoundryError, RecordError, TrainingError  # noqa: E402
from gptcore.home import home  # noqa: E402
from gptcore.package import open_package  # noqa: E402
from gptcore.progress import doing  # noqa: E402
from gptcore.redact import without_password  # noqa: E402
from train_job.session.begin import absolute  # noqa: E402
from train_job.sweeps.begin import PLAN, begin_sweep  # noqa: E402
from train_job.cluster.connect import ray_cluster, resources_per_worker, resources_text  # noqa: E402
from train_job.config import build_config  # noqa: E402
from train_job.session.console import Console  # noqa: E402
from train_job.files import read_json, written_whole  # noqa: E402
from train_job.session.history import History  # noqa: E402
from train_job.tracking.pages import NOTE  # noqa: E402
from train_job.session.exit_code import as_problem, exit_code  # noqa: E402
from train_job.session.record import RUN, Record, origins_of, read_record, tracked_at, write_record  # noqa: E402
from train_job.sweeps.progress import SweepProgress  # noqa: E402
from train_job.sweeps.space import SweepConfig, described  # noqa: E402
from train_job.session.stop import StopSignals  # noqa: E402
from train_job.sweeps.trials import ENDING, Ending, Trial, ranked, table, table_text, write_table  # noqa: E402
from train_job.session.whatnow import Ended, lines, script_command  # noqa: E402

if TYPE_CHECKING:
    from train_job.data.inputs import Inputs
    from train_job.session.session import Session


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns the exit code."""

    def job() -> int:
        with begin_sweep(sys.argv[1:] if argv is None else argv) as (config, run_dir):
            return Sweep(config, run_dir).execute()

    return exit_code(job)


class Sweep:
    """One sweep from the driver's side: its trials, their progress, and the outcome."""

    def __init__(self, config: SweepConfig, run_dir: Path) -> None:
        self.config, self.run_dir, self.name = config, run_dir, str(config.base["name"])
        storage = str(config.base["storage_path"])
        storage = f"{storage.rstrip('/')}/{self.name}" if "://" in storage else str(run_dir)
        self.trials: list[Trial] = []
        for number, values in enumerate(config.values(), start=1):
            name = f"{self.name}-{number:02}"
            run = absolute(build_config(config.base, values, {"name": name}), storage, run_dir)
            self.trials.append(Trial(number, values, run, run_dir / name))
        self.stops = StopSignals(self._stop)
        self.run_id = self.experiment_id = ""
        self.channel: Any = None
        self.began = False

    def execute(self) -> int:
        """Plans, runs the trials, registers the best; returns the exit code. Raises FoundryError for wrong input."""
        from train_job.tracking.client import check_server, check_user

        # A trial is several processes, but only one of them computes: no need for Ray's warning.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        self.record = read_record(self._record)
        self.uri = tracked_at(self.record)
        check_server(self.uri)
        with contextlib.ExitStack() as stack:
            cluster = functools.cache(lambda: stack.enter_context(ray_cluster()))
            with doing("preparing the text"):
                self.inputs = self._prepare(cluster)
            check_user(self.uri)
            left = [trial for trial in self.trials if not trial.ending()]
            if left:
                ray, alone = cluster()
                self._share(ray.nodes(), len(left), alone)
            self.console = Console(self.run_dir)
            stack.callback(self.console.close)
            stack.enter_context(self.stops)
            try:
                with doing("opening the sweep in MLflow"):
                    self._open()
                if left:
                    self._introduce(ray)
                    self._tune(ray, left)
                self.stops.check()
                with doing("finishing the sweep"):
                    return self._conclude()
            except BaseException as error:
                # A signal to all of our process group ends Ray too, and then anything may be raised.
                if isinstance(error, KeyboardInterrupt) or self.stops.number:
                    self._end("KILLED")
                    self.console.say(f"stopped; go on with: {self.resume_command()}")
                    self._what_now()
                    return 128 + self.stops.number
                self._end("FAILED")  # whatever it is, the run must not be left as running
                from train_job.session.finish import failure_code

                problem = as_problem(error, self.run_dir) if isinstance(error, (FoundryError, OSError)) else None
                if not problem:
                    raise
                self.console.say(f"error: {problem}")
                self._what_now()
                return failure_code(problem, self.began)

    def resume_command(self) -> str:
        """The command that resumes this sweep."""
        default = self.run_dir.parent == home() / "runs"
        storage = [] if default else ["--storage-path", str(self.run_dir.parent)]
        return script_command("train_job/sweep.py", "--resume", self.name, *storage)

    @property
    def _record(self) -> Path:
        return self.run_dir / RUN

    def _stop(self) -> None:
        """What a signal does at once: the trials are asked to save and end, and MLflow's runs are marked."""
        if self.channel:
            self.channel.set_stop.remote()
        self.console.say("stopping: trials that run are saving a checkpoint (once more to leave at once)")
        self._end("KILLED")

    def _end(self, status: str) -> None:
        """Ends the MLflow runs of the sweep and of trials that have not ended."""
        for folder in (*(trial.folder for trial in self.trials), self.run_dir):
            if not (folder / ENDING).exists():
                self._end_run(folder / RUN, status)

    def _end_run(self, record: Path, status: str) -> None:
        from train_job.tracking import runs as tracking

        try:
            if found := read_record(record):
                tracking.finish_run(self.uri, found.run_id, status)
        except (RecordError, TrainingError) as error:
            self.console.say(f"warning: the end of {record.parent.name} could not be recorded: {error}")

    def _prepare(self, cluster: Any) -> dict[int, Inputs]:
        """Every trial's inputs. Shards are made here, once per tokenizer, before the first trial starts."""
        from train_job.cluster.prepare import prepare_on_cluster
        from train_job.tracking.registry import pin

        if parent := self.config.base.get("init_from"):
            parent = pin(str(parent), self.uri)
            self.config = replace(self.config, base=self.config.base | {"init_from": parent})
            self.trials = [replace(t, config=replace(t.config, init_from=parent)) for t in self.trials]
        begun = self.record.text if self.record else None
        inputs: dict[int, Inputs] = {}
        for place, trial in enumerate(self.trials):
            if place:  # all are evaluated as often as the first
                one = inputs[1].config
                config = replace(trial.config, log_interval=one.log_interval, eval_interval=one.eval_interval)
                self.trials[place] = trial = replace(trial, config=config)
            inputs[trial.number] = prepare_on_cluster(trial.config, cluster, begun)
            begun = origins_of(inputs[trial.number])  # all read the text of the first
        return inputs

    def _share(self, nodes: list[dict[str, Any]], left: int, alone: bool) -> None:
        """Decides how many trials run at a time and what their workers get. Raises ConfigError if there is no room."""
        config = self.trials[0].config
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        room = sum(
            r.get("GPU", 0) if config.use_gpu else r.get("CPU", 0) // (config.cpus_per_worker or 1) for r in alive
        )
        self.at_once = self.config.concurrency or max(1, min(left, int(room // config.workers[1])))
        self.resources = resources_per_worker(config, nodes, alone, self.at_once)

    def _open(self) -> None:
        """Opens the parent run in MLflow, or reopens the one that the folder names."""
        import yaml

        from train_job.session.session import dataset_uses
        from train_job.tracking import runs as tracking

        if self.record:
            self.run_id = self.record.run_id
            tracking.resume_run(self.uri, self.run_id)
        else:
            inputs = self.inputs[1]
            self.run_id = tracking.start_run(
                self.uri,
                asdict(self.config) | {"base": {k: v for k, v in self.config.base.items() if k != "storage_path"}},
                name=self.name,
                datasets=dataset_uses(inputs),
                tags={
                    "sweep": self.name,
                    NOTE: f"A sweep of {len(self.trials)} trials: {described(self.config.search)}",
                },
                experiment=inputs.config.experiment,
            )
            write_record(self._record, self.run_id, self.uri, inputs)
        with contextlib.suppress(TrainingError):  # it is only needed for a link
            self.experiment_id = tracking.experiment_of(self.uri, self.run_id)
        with written_whole(self.run_dir / PLAN) as file:
            file.write(yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True).encode())

    def _introduce(self, ray: Any) -> None:
        """Prints what is about to happen, before the first step."""
        c, i, say = self.config, self.inputs[1], self.console.say
        one = self.trials[0].config
        how = "every combination" if c.grid else f"drawn with seed {c.draw_seed}"
        say(f"sweep     {self.name}: {len(self.trials)} trials, {how}")
        say(f"search    {described(c.search)}")
        say(
            f"text      {i.train_corpus.name}: {i.train.num_bytes:,} bytes; {i.validation.num_bytes:,} bytes more judge"
        )
        for note in i.notes:
            say(f"          {note}")
        rungs = ", ".join(f"{self.grace_steps * c.reduction**n:.0f}" for n in range(3))
        asha = f"only the best 1/{c.reduction:g} go on after steps {rungs}… (ASHA)"
        say(f"stopping  {asha if c.asha else 'every trial runs to its end'}")
        workers = "a worker" if one.num_workers == "1" else f"{one.num_workers} workers"
        say(f"trials    {self.at_once} at a time, {workers} each with {resources_text(self.resources)}")
        try:
            resources_per_worker(one, ray.nodes(), fixed=True, runs=self.at_once)
        except ConfigError as error:
            say(f"waiting   for the cluster to grow: {error}")
        say(f"run       {self.name} ({self.run_id})")
        say(f"tracking  {without_password(self.uri)}")

    @property
    def grace_steps(self) -> int:
        """The first step at which ASHA may stop a trial."""
        return self.config.grace_steps or self.inputs[1].config.eval_interval or 1

    def _tune(self, ray: Any, left: list[Trial]) -> None:
        """Runs the trials with Ray Tune in a thread, so that this one can show progress and act on signals."""
        from train_job.cluster.channel import start_channel
        from train_job.cluster.failures import why
        from train_job.cluster.training import POLL_SECONDS
        from train_job.sweeps.tune import TrialContext, tuner

        channel = start_channel(ray)
        tags = {"mlflow.parentRunId": self.run_id, "sweep": self.name}
        context = TrialContext(self.trials, self.resources, tags, self.uri, channel)
        ended: list[Any] = []

        def fit() -> None:
            try:
                with tempfile.TemporaryDirectory() as folder:  # Tune's own state; ours is in the trials' folders
                    judge = (self.grace_steps, self.config.reduction) if self.config.asha else None
                    ended.append(tuner(context, left, judge, self.at_once, folder).fit())
            except Exception as error:
                ended.append(error)

        progress = SweepProgress(self.trials, left, self.config.keep, self.console)

        def show() -> None:
            for line in ray.get(channel.read.remote()):
                self.console.say(line)
            progress.show()

        thread = threading.Thread(target=fit, daemon=True)
        self.stops.check()
        self.channel, self.began = channel, True
        thread.start()
        with doing(lambda: f"waiting for news of the trials: {progress.status()}"):
            while thread.is_alive():
                show()
                thread.join(POLL_SECONDS)
        self.channel = None
        self.stops.check()
        if problem := ray.get(channel.failed.remote()):
            raise problem
        if isinstance(ended[0], Exception):
            raise ended[0]
        for result in ended[0]:
            trial = self.trials[result.config["index"]]
            if not trial.ending():  # its actor was lost
                reason = why(result.error) if result.error else "it was lost"
                trial.end(Ending("FAILED", reason, int(trial.best()["step"]), 0.0))
                self._end_run(trial.folder / RUN, "FAILED")
        progress.show()

    def _conclude(self) -> int:
        """Prints the table and registers the best trial's package; returns the exit code."""
        from train_job.session.finish import OUTCOME, deliver, register
        from train_job.session.session import Trained
        from train_job.tracking import runs as tracking
        from train_job.tracking.spool import Spool

        rows = table(self.trials)
        for line in table_text(rows):
            self.console.say(line)
        files = [*write_table(rows, self.run_dir), *self._figures(), self.run_dir / PLAN, self.console.path]
        best, ending = ranked(self.trials)[0]
        tags, code = {}, 1
        if ending.status == "FINISHED":
            self.console.say(f"best      {best.title}")
            package = open_package(best.folder / "package")
            code = register(self._session_of(best), Trained(), package, tell_what_now=False)
        version = read_json(best.folder / OUTCOME, "the version is in MLflow") if code == 0 else None
        self._what_now(best, version)
        if version:
            tags = {"sweep.best": best.name, "sweep.version": f"{version['name']} {version['version']}"}
        self.stops.late = True
        spool = Spool(self.run_dir / "spool", self.run_id, self.uri)
        until = math.inf
        for trial in self.trials:
            until = min(until, trial.best()["bits_per_byte"])
            if math.isfinite(until):
                spool.metrics(trial.number, {"best_bits_per_byte": until})
        deliver(spool, files, self.console.say)
        try:
            tracking.tag_run(self.uri, self.run_id, tags)
        except TrainingError as error:
            self.console.say(f"warning: {error}")
        self._end("FINISHED" if code == 0 else "FAILED")
        return code

    def _what_now(self, best: Trial | None = None, version: Mapping[str, Any] | None = None) -> None:
        """Prints how to go on: with the best trial's model if there is one, and with the sweep if it is not over."""
        from train_job.session.report import ended

        there = None
        if best:
            run_id = self._record_of(best).run_id
            config = self.inputs[best.number].config
            there = ended(config, best.folder, self.uri, run_id, self.experiment_id, version)
        resume = self.resume_command() if self.run_id else ""  # before that there is nothing to resume
        own = Ended(self.uri, self.experiment_id, self.run_id, resume=resume)
        if there and version:
            more = 2 * len(self.trials)
            try:
                replace(self.config, trials=more).values()
                further = "" if self.config.grid else f"{own.resume} --trials {more}"
            except ConfigError:  # the search space has no more values
                further = ""
            own = replace(there, run_id=self.run_id, resume=further)
        for line in lines(own):
            self.console.say(line)

    def _session_of(self, trial: Trial) -> Session:
        """The session of a trial that has ended, so that its model can be registered."""
        from train_job.session.session import Session

        inputs, record = self.inputs[trial.number], self._record_of(trial)
        history = History(trial.folder / "history.jsonl")
        return Session(
            inputs.config,
            trial.folder,
            inputs,
            self.uri,
            record.run_id,
            self.experiment_id,
            history,
            self.console,
            self.stops,
        )

    def _record_of(self, trial: Trial) -> Record:
        record = read_record(trial.folder / RUN)
        assert record, "a trial that has ended was opened"
        return record

    def _figures(self) -> list[Path]:
        """Draws the curves of all trials, and the best result so far by trial."""
        from train_job import figures

        folder = self.run_dir / "figures"
        folder.mkdir(exist_ok=True)
        curves = {f"{trial.number:02}": trial.evaluations() for trial in self.trials}
        figures.sweep_curves(curves, f"{ranked(self.trials)[0][0].number:02}", folder / "trials.png")
        figures.best_so_far([trial.best()["bits_per_byte"] for trial in self.trials], folder / "best_so_far.png")
        return [folder / "trials.png", folder / "best_so_far.png"]


if __name__ == "__main__":
    sys.exit(main())
