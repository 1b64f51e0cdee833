"""The sweep: many trials of one recipe, poor ones stopped early, the best one registered.

    python train_job/sweep.py train_job/sweeps/quick.yaml --data notes.txt

In: a YAML file (its keys are the fields of `train_job.sweeps.space.SweepConfig`) and flags, those of run.py included.
Out: a parent run in MLflow with one run per trial below it, a table, and a version of the best trial's model. Ray Tune
runs a few trials at a time. Their state is in their folders, so a sweep that was stopped can be resumed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == ROOT / "train_job":  # run as a script: our modules are train_job.*, not top-level
    sys.path[0] = str(ROOT)

import train_job.environment  # noqa: E402, F401  # first: it sets what libraries read when they are imported
from gptcore.errors import FoundryError  # noqa: E402
from gptcore.progress import doing  # noqa: E402
from train_job.cluster.connect import ray_cluster  # noqa: E402
from train_job.session.console import Console  # noqa: E402
from train_job.session.exit_code import as_problem, exit_code  # noqa: E402
from train_job.session.record import RUN, read_record, tracked_at  # noqa: E402
from train_job.session.stop import StopSignals  # noqa: E402
from train_job.sweeps.begin import begin_sweep  # noqa: E402
from train_job.sweeps.space import SweepConfig  # noqa: E402

if TYPE_CHECKING:
    from train_job.sweeps.session import Sweep
    from train_job.sweeps.tuning import Tuning


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns the exit code."""

    def job() -> int:
        with begin_sweep(sys.argv[1:] if argv is None else argv) as (config, run_dir):
            return SweepJob(config, run_dir).execute()

    return exit_code(job)


class SweepJob:
    """One sweep from command line to registry. A stop signal may come at any time, so it knows how far it has got."""

    def __init__(self, config: SweepConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._stops = StopSignals(self._stop)
        self._sweep: Sweep | None = None
        self._tuning: Tuning | None = None

    def execute(self) -> int:
        """Plans, runs the trials, registers the best; returns the exit code. Raises FoundryError for wrong input."""
        from train_job.sweeps.finish import finish
        from train_job.sweeps.session import open_sweep, prepare_trials, with_pinned_parent
        from train_job.tracking.client import check_server, check_user

        # A trial is several processes, but only one of them computes: no need for Ray's warning.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        uri = tracked_at(read_record(self._run_dir / RUN))
        check_server(uri)
        with contextlib.ExitStack() as stack:
            cluster = functools.cache(lambda: stack.enter_context(ray_cluster()))
            with doing("preparing the text"):
                config = with_pinned_parent(self._config, uri)
                prepared = prepare_trials(config, self._run_dir, cluster)
            check_user(uri)
            left = sum(not trial.ending() for trial, _ in prepared.values())
            if left:
                ray, alone = cluster()
                from train_job.sweeps.tuning import Tuning, share  # Ray's libraries read the environment set for them

                shares = share(prepared[1][0].config, config.concurrency, ray.nodes(), left, alone)
            self._console = stack.enter_context(contextlib.closing(Console(self._run_dir)))
            stack.enter_context(self._stops)
            try:
                with doing("opening the sweep in MLflow"):
                    self._sweep = open_sweep(config, self._run_dir, prepared, uri, self._console, self._stops)
                if left:
                    self._tuning = Tuning(self._sweep, *shares)
                    self._tuning.introduce(ray.nodes())
                    self._tuning.run(ray)
                self._stops.check()
                with doing("finishing the sweep"):
                    return finish(self._sweep)
            except BaseException as error:
                return self._end_early(error)

    def _stop(self) -> None:
        """What a signal does at once: the trials are asked to save and end, and MLflow's runs are marked."""
        from train_job.sweeps.finish import end

        if self._tuning:
            self._tuning.stop()
        self._console.say("stopping: trials that run are saving a checkpoint (once more to leave at once)")
        if self._sweep:
            end(self._sweep, "KILLED")

    def _end_early(self, error: BaseException) -> int:
        """Records a sweep that was stopped or failed; returns its exit code. Raises `error` if it is a defect."""
        from train_job.session.finish import failure_code
        from train_job.sweeps.finish import end, what_now
        from train_job.sweeps.session import resume_command

        say = self._console.say
        # A signal to the whole process group ends Ray too, and then anything may be raised.
        stopped = isinstance(error, KeyboardInterrupt) or bool(self._stops.number)
        if self._sweep:
            end(self._sweep, "KILLED" if stopped else "FAILED")  # it must not be left as running
        problem = as_problem(error, self._run_dir) if isinstance(error, (FoundryError, OSError)) else None
        if stopped:
            say(f"stopped; go on with: {resume_command(self._run_dir)}")
        elif problem:
            say(f"error: {problem}")
        else:
            raise error
        if self._sweep:
            what_now(self._sweep)
        elif problem and (self._run_dir / RUN).exists():
            say(f"go on with: {resume_command(self._run_dir)}")
        if stopped:
            return 128 + self._stops.number
        assert problem
        return failure_code(problem, began=bool(self._tuning and self._tuning.began))


if __name__ == "__main__":
    sys.exit(main())
