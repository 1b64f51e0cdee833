"""The driver's side of a sweep's trials: Ray Tune in a thread, and the trials' news as it comes.

In: an open `Sweep` and what each trial gets. Out: lines on the console; in each trial's folder, how it ended.
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

from gptcore.errors import ConfigError
from gptcore.progress import doing
from gptcore.redact import without_password
from train_job.cluster.channel import start_channel
from train_job.cluster.connect import resources_per_worker, resources_text
from train_job.cluster.failures import why
from train_job.cluster.training import POLL_SECONDS
from train_job.config import TrainConfig
from train_job.sweeps.finish import end_run
from train_job.sweeps.progress import SweepProgress
from train_job.sweeps.session import Sweep
from train_job.sweeps.space import described
from train_job.sweeps.trials import Ending
from train_job.sweeps.tune import TrialContext, tuner


class Tuning:
    """The trials of one sweep that have not ended, `at_once` at a time, each worker with these `resources`."""

    def __init__(self, sweep: Sweep, at_once: int, resources: dict[str, float]) -> None:
        self._sweep, self._at_once, self._resources = sweep, at_once, resources
        self._channel: Any = None
        self._began = False

    @property
    def began(self) -> bool:
        """Whether Tune was started."""
        return self._began

    def stop(self) -> None:
        """Asks the trials to save a checkpoint and end."""
        if self._channel:
            self._channel.set_stop.remote()

    def introduce(self, nodes: list[dict[str, Any]]) -> None:
        """Prints what is about to happen, before the first step."""
        s, c, i, say = self._sweep, self._sweep.config, self._sweep.inputs[1], self._sweep.console.say
        one = s.trials[0].config
        how = "every combination" if c.grid else f"drawn with seed {c.draw_seed}"
        say(f"sweep     {s.name}: {len(s.trials)} trials, {how}")
        say(f"search    {described(c.search)}")
        say(f"text      {i.train_corpus.name}: {i.train.size}; {i.validation.size} more judge")
        for note in i.notes:
            say(f"          {note}")
        rungs = ", ".join(f"{s.grace_steps * c.reduction**n:.0f}" for n in range(3))
        asha = f"only the best 1/{c.reduction:g} go on after steps {rungs}… (ASHA)"
        say(f"stopping  {asha if c.asha else 'every trial runs to its end'}")
        workers = "a worker" if one.num_workers == "1" else f"{one.num_workers} workers"
        say(f"trials    {self._at_once} at a time, {workers} each with {resources_text(self._resources)}")
        try:
            resources_per_worker(one, nodes, fixed=True, runs=self._at_once)
        except ConfigError as error:
            say(f"waiting   for the cluster to grow: {error}")
        say(f"run       {s.name} ({s.run_id})")
        say(f"tracking  {without_password(s.uri)}")

    def run(self, ray: Any) -> None:
        """Runs the trials with Ray Tune in a thread, so that this one can show progress and act on signals.

        Raises the problem that all trials have, such as a full disk, what Tune raises, and KeyboardInterrupt if the
        sweep was told to stop.
        """
        s = self._sweep
        channel = start_channel(ray)
        tags = {"mlflow.parentRunId": s.run_id, "sweep": s.name}
        context = TrialContext(s.trials, self._resources, tags, s.uri, channel)
        judge = (s.grace_steps, s.config.reduction) if s.config.asha else None
        left = [trial for trial in s.trials if not trial.ending()]
        ended: list[Any] = []

        def fit() -> None:
            try:
                with tempfile.TemporaryDirectory() as folder:  # Tune's own state; ours is in the trials' folders
                    ended.append(tuner(context, left, judge, self._at_once, folder).fit())
            except Exception as error:
                ended.append(error)

        progress = SweepProgress(s.trials, s.config.keep, s.console)

        def show() -> None:
            for line in ray.get(channel.read.remote()):
                s.console.say(line)
            progress.show()

        thread = threading.Thread(target=fit, daemon=True)
        s.stops.check()
        self._channel, self._began = channel, True
        thread.start()
        with doing(lambda: f"waiting for news of the trials: {progress.status()}"):
            while thread.is_alive():
                show()
                thread.join(POLL_SECONDS)
        self._channel = None
        s.stops.check()
        if problem := ray.get(channel.failed.remote()):
            raise problem
        if isinstance(ended[0], Exception):
            raise ended[0]
        for result in ended[0]:
            trial = s.trials[result.config["index"]]
            if not trial.ending():  # its actor was lost
                reason = why(result.error) if result.error else "it was lost"
                trial.end(Ending("FAILED", reason, int(trial.best()["step"]), 0.0))
                end_run(s, trial.folder, "FAILED")
        progress.show()


def share(
    config: TrainConfig, concurrency: int | None, nodes: list[dict[str, Any]], left: int, fixed: bool
) -> tuple[int, dict[str, float]]:
    """How many trials run at a time, by default as many of those `left` as fit, and what each worker gets.

    Raises ConfigError if the cluster is `fixed` and has no room.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(r.get("GPU", 0) if config.use_gpu else r.get("CPU", 0) // (config.cpus_per_worker or 1) for r in alive)
    at_once = concurrency or max(1, min(left, int(room // config.workers[1])))
    return at_once, resources_per_worker(config, nodes, fixed, at_once)
