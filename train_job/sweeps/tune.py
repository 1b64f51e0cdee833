"""What Ray Tune runs: ASHA, and trials that are runs, each driven from an actor on the sweep's own machine.

In: a `Plan`, and a trial's place in it. Out: bits per byte after every evaluation, for ASHA; and in the trial's folder
what a run leaves, its package among it. Workers, checkpoints, restarts, metrics: all of it is `run.Run`'s. Tune asks
for the next judgement with `step`; a trial that it stops is ended with `cleanup`, or when the actor gets its next one.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from gptcore.errors import FoundryError, StorageFull, TrainingError
from train_job.cluster.worker import StopFlag
from train_job.config import UNBOUNDED
from train_job.data.inputs import prepare_inputs
from train_job.run import Run
from train_job.session import outcome
from train_job.session.console import Console
from train_job.session.record import read_record
from train_job.sweeps.trials import Ending, Trial, ranked
from train_job.tracking import runs as tracking
from train_job.training.events import Evaluation, Started


@dataclass(frozen=True)
class Plan:
    """What the driver hands to every trial."""

    trials: list[Trial]
    resources: dict[str, float]
    tags: dict[str, str]
    uri: str = field(repr=False)
    board: Any
    """The sweep's own: where a stop of all of it is asked for."""


class TunedTrial(tune.Trainable):
    """The actor. One after the other, it has several trials: what it imports takes longer than a short trial."""

    def setup(self, config: dict[str, Any], plan: Plan) -> None:  # type: ignore[override]  # tune.with_parameters' way
        """Opens the run, or goes on with it, and begins to train."""
        self.trial, self.board, self.stop_asked = plan.trials[config["index"]], plan.board, StopFlag(plan.board)
        known = self.trial.evaluations()  # of one that goes on: Tune is told again
        self.due = deque({"step": row["step"], "bits_per_byte": row["bits_per_byte"]} for row in known)
        self.last: dict[str, float] = {"step": 0, "bits_per_byte": math.inf}
        self.told = known[-1]["step"] if known else 0
        self.began, self.over = time.monotonic(), False
        self.news: Iterator[list[Any]] = iter(())
        run = self.run = Run(self.trial.config, self.trial.folder, self.trial.title, plan.tags)
        run.uri, run.resources, run.console = plan.uri, plan.resources, Console(self.trial.folder)
        if self.stop_asked():
            return
        try:
            sweep = read_record(self.trial.folder.parent / "run.json")  # its text is the trial's
            run.inputs = prepare_inputs(run.config, refresh=False, begun=sweep.text if sweep else None)
            run.config = run.inputs.config
            run.open()
            run.introduce(ray.nodes())
            self.news = run.train(ray)
            self._hear(next(self.news))
        except FoundryError as problem:
            run.problem = problem

    def step(self) -> dict[str, Any]:
        """The next evaluation, or that there is none."""
        while not self.due and not self.stop_asked() and (news := next(self.news, None)) is not None:
            self._hear(news)
        if self.due and not self.stop_asked():
            self.last = self.due.popleft()
            return dict(self.last)
        self._finish()
        return self.last | {"done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial's turn."""
        self._finish()
        self.setup(new_config)  # type: ignore[call-arg]  # the plan comes with it
        return True

    def cleanup(self) -> None:
        """The last trial's end."""
        self._finish()

    def _hear(self, news: list[Any]) -> None:
        for event in news:
            if isinstance(event, Started) and self.run.began:
                self.board.post.remote(f"{self.trial.name}  {self.run.restarted(event)}")
        self.run.show(news)
        for event in news:
            if isinstance(event, Started):
                self.began = time.monotonic()
            elif isinstance(event, Evaluation) and event.step > self.told:
                self.told = event.step
                self.due.append({"step": event.step, "bits_per_byte": event.bits_per_byte})

    def _finish(self) -> None:
        """Has the workers stop, if they have not, and records how it ended, unless the whole sweep is stopping."""
        if self.over:
            return
        run, self.over = self.run, True
        if run.board:
            run.board.ask_stop.remote()
        for news in self.news:
            self._hear(news)
        try:
            if not run.problem and not self._interrupted():
                outcome.build(run)
        except FoundryError as problem:
            run.problem = problem
        self._record()
        run.console.close()

    def _interrupted(self) -> bool:
        """Whether the sweep is stopping: then the trial has not ended, and goes on with the sweep."""
        return self.stop_asked() and not (self.run.finished and self.run.finished.reason != "stopped")

    def _record(self) -> None:
        run, seconds = self.run, time.monotonic() - self.began
        steps = run.finished.step if run.finished else run.history.last_step if run.run_id else 0
        if self._interrupted():
            return self._close("KILLED", "")
        if isinstance(run.problem, StorageFull):  # every trial's problem; once it is mended, this one goes on
            ray.get([self.board.fail.remote(run.problem), self.board.ask_stop.remote()])
            return self._close("FAILED", "")
        if run.problem:
            ending = Ending("FAILED", str(run.problem), steps, seconds)
        else:
            assert run.finished
            stopped = run.finished.reason == "stopped"
            at = int(self.last["step"]) if stopped else steps
            ending = Ending("FINISHED", "ASHA" if stopped else run.finished.reason, at, seconds)
        self._close(ending.status, str(ending))
        self.trial.end(ending)
        return None

    def _close(self, status: str, end: str) -> None:
        run = self.run
        if not run.run_id:
            return
        outcome.close(run, status, [run.run_dir / "config.yaml", run.console.path])
        try:
            tracking.tag_run(run.uri, run.run_id, {"sweep.end": end} if end else {})
        except TrainingError as error:
            run.console.say(f"warning: {error}")


class StopAll(tune.Stopper):
    """Ends the sweep once that is asked for on its board; no trial alone."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.asked: StopFlag | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self.asked = self.asked or StopFlag(self.board)
        return self.asked()


def tuner(plan: Plan, left: list[Trial], asha: tuple[int, float] | None, at_once: int, folder: str) -> tune.Tuner:
    """Tune, about to run those that are `left`; what it writes for itself goes to `folder`."""
    trainable = tune.with_parameters(TunedTrial, plan=plan)
    here = f"node:{ray.util.get_node_ip_address()}"  # trials are driven where their folders are, and take no CPU there
    return tune.Tuner(
        tune.with_resources(trainable, {here: 0.001}),
        param_space={"index": tune.grid_search([plan.trials.index(trial) for trial in left])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler(plan.trials, *asha) if asha else None, max_concurrent_trials=at_once, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            stop=StopAll(plan.board),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def scheduler(trials: list[Trial], grace_steps: int, reduction: float) -> ASHAScheduler:
    """ASHA, told of the trials that have ended already."""
    asha = ASHAScheduler(
        time_attr="step",
        metric="bits_per_byte",
        mode="min",
        grace_period=grace_steps,
        reduction_factor=reduction,
        max_t=UNBOUNDED,  # trials end by themselves
    )
    controller: Any = None  # it does not look at it
    for trial, _ in ranked(trials):
        stand_in: Any = SimpleNamespace(trial_id=trial.name)
        asha.on_trial_add(controller, stand_in)
        for row in trial.evaluations():
            asha.on_trial_result(controller, stand_in, row)
    return asha
