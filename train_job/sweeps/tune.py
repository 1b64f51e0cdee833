"""What Ray Tune runs: ASHA, and trials that are runs, each driven by an actor on the sweep's own machine.

In: a `TrialContext`, and a trial's index in it. Out: bits per byte after every evaluation, for ASHA; and in the trial's
folder what a run leaves, its package included. A trial is a `Session` and its `Training`, as a single run is. Tune asks
for the next evaluation with `step`; a trial that it stops ends with `cleanup`, or when the actor gets its next one.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from gptcore.errors import FoundryError, StorageFull, TrainingError
from train_job.cluster.training import Training
from train_job.cluster.worker import StopFlag
from train_job.config import UNBOUNDED
from train_job.data.inputs import prepare_inputs
from train_job.session.console import Console
from train_job.session.finish import build, close
from train_job.session.record import CONFIG, RUN, read_record
from train_job.session.session import Session, Trained, open_session
from train_job.session.stop import StopSignals
from train_job.sweeps.trials import Ending, Trial, ranked
from train_job.tracking import runs as tracking
from train_job.training.events import Evaluation, Started


@dataclass(frozen=True)
class TrialContext:
    """What the sweep's driver hands to every trial."""

    trials: Sequence[Trial]
    resources: dict[str, float]
    tags: dict[str, str]
    uri: str = field(repr=False)
    channel: Any
    """The sweep's own: its stop flag ends the whole sweep."""


class TunedTrial(tune.Trainable):
    """The actor that drives trials, several one after the other: its imports take longer than a short trial."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:  # type: ignore[override]  # with_parameters
        """Opens the trial's run, or reopens it, and starts to train."""
        self.trial, self.context = context.trials[config["index"]], context
        self.stop_asked = StopFlag(context.channel)
        known = self.trial.evaluations()  # of a trial that goes on: Tune is told again
        self.due = deque({"step": row["step"], "bits_per_byte": row["bits_per_byte"]} for row in known)
        self.last: dict[str, float] = {"step": 0, "bits_per_byte": math.inf}
        self.last_known = known[-1]["step"] if known else 0
        self.began, self.over = time.monotonic(), False
        self.console = Console(self.trial.folder)
        self.session: Session | None = None
        self.training: Training | None = None
        self.problem: FoundryError | None = None
        self.events: Iterator[list[Any]] = iter(())
        if self.stop_asked():
            return
        try:
            self._start(context)
        except FoundryError as problem:
            self.problem = problem

    def _start(self, context: TrialContext) -> None:
        sweep = read_record(self.trial.folder.parent / RUN)  # the trial has the sweep's text
        inputs = prepare_inputs(self.trial.config, refresh=False, begun=sweep.text if sweep else None)
        stops = StopSignals(lambda: None)  # signals reach the sweep's driver, not this actor
        self.session = open_session(
            inputs, self.trial.folder, context.uri, self.console, stops, self.trial.title, context.tags
        )
        self.training = Training(self.session, context.resources, on_restart=self._restarted)
        self.training.introduce(ray.nodes())
        self.events = self.training.run(ray)
        self._hear(next(self.events))

    def step(self) -> dict[str, Any]:
        """The next evaluation, or that there is none."""
        while not self.due and not self.stop_asked() and (events := next(self.events, None)) is not None:
            self._hear(events)
        if self.due and not self.stop_asked():
            self.last = self.due.popleft()
            return dict(self.last)
        self._finish()
        return self.last | {"done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends this trial; the actor is set up for the next one."""
        self._finish()
        self.setup(new_config)  # type: ignore[call-arg]  # the context comes with it
        return True

    def cleanup(self) -> None:
        """Ends the last trial."""
        self._finish()

    def _restarted(self, text: str) -> None:
        self.context.channel.post.remote(f"{self.trial.name}  {text}")

    def _hear(self, events: list[Any]) -> None:
        """Keeps evaluations for Tune."""
        for event in events:
            if isinstance(event, Started):
                self.began = time.monotonic()
            elif isinstance(event, Evaluation) and event.step > self.last_known:
                self.last_known = event.step
                self.due.append({"step": event.step, "bits_per_byte": event.bits_per_byte})

    def _finish(self) -> None:
        """Stops the workers if they still train, and records how the trial ended, unless the sweep itself stops."""
        if self.over:
            return
        self.over = True
        if self.training:
            self.training.stop()
        for events in self.events:
            self._hear(events)
        trained = self.training.trained if self.training else Trained(problem=self.problem)
        problem = self.problem or trained.problem
        interrupted = self.stop_asked() and not (trained.finished and trained.finished.reason != "stopped")
        if self.session and not problem and not interrupted:
            try:
                build(self.session, trained)
            except FoundryError as error:
                problem = error
        self._record(trained, problem, interrupted)
        self.console.close()

    def _record(self, trained: Trained, problem: FoundryError | None, interrupted: bool) -> None:
        """Writes down how the trial ended. One that was interrupted has not: it goes on with the sweep."""
        seconds, finished = time.monotonic() - self.began, trained.finished
        steps = finished.step if finished else self.session.history.last_step if self.session else 0
        if interrupted:
            return self._close(trained, "KILLED", "")
        if isinstance(problem, StorageFull):  # every trial has this problem; once it is solved, this one goes on
            ray.get([self.context.channel.fail.remote(problem), self.context.channel.set_stop.remote()])
            return self._close(trained, "FAILED", "")
        if problem:
            ending = Ending("FAILED", str(problem), steps, seconds)
        else:
            assert finished
            stopped = finished.reason == "stopped"
            at = int(self.last["step"]) if stopped else steps
            ending = Ending("FINISHED", "ASHA" if stopped else finished.reason, at, seconds)
        self._close(trained, ending.status, str(ending))
        self.trial.end(ending)
        return None

    def _close(self, trained: Trained, status: str, end: str) -> None:
        session = self.session
        if not session:
            return
        close(session, trained, status, [session.run_dir / CONFIG, self.console.path])
        try:
            tracking.tag_run(session.uri, session.run_id, {"sweep.end": end} if end else {})
        except TrainingError as error:
            self.console.say(f"warning: {error}")


class StopAll(tune.Stopper):
    """Ends the sweep once its channel's stop flag is set; never a single trial."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.asked: StopFlag | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self.asked = self.asked or StopFlag(self.channel)
        return self.asked()


def tuner(
    context: TrialContext, left: Sequence[Trial], asha: tuple[int, float] | None, at_once: int, folder: str
) -> tune.Tuner:
    """Tune, about to run those that are `left`; what it writes for itself goes to `folder`."""
    trainable = tune.with_parameters(TunedTrial, context=context)
    here = f"node:{ray.util.get_node_ip_address()}"  # trials are driven where their folders are, and take no CPU there
    return tune.Tuner(
        tune.with_resources(trainable, {here: 0.001}),
        param_space={"index": tune.grid_search([context.trials.index(trial) for trial in left])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler(context.trials, *asha) if asha else None,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            stop=StopAll(context.channel),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def scheduler(trials: Sequence[Trial], grace_steps: int, reduction: float) -> ASHAScheduler:
    """ASHA with the results of the trials that have ended already.

    Tells it of them as Tune does, without a controller and with a stand-in for Tune's trial, which Ray does not
    promise to accept. Tried with Ray 2.60; tests/train_job/cluster/test_internals.py fails when that changes.
    """
    asha = ASHAScheduler(
        time_attr="step",
        metric="bits_per_byte",
        mode="min",
        grace_period=grace_steps,
        reduction_factor=reduction,
        max_t=UNBOUNDED,  # trials end by themselves
    )
    controller: Any = None  # ASHA does not use it
    for trial, _ in ranked(trials):
        stand_in: Any = SimpleNamespace(trial_id=trial.name)
        asha.on_trial_add(controller, stand_in)
        for row in trial.evaluations():
            asha.on_trial_result(controller, stand_in, row)
    return asha
