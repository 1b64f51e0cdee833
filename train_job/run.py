"""The training job: from a command line to a registered model. Parse, plan, train, register, report.

Runs alike as `python train_job/run.py`, through `ray job submit -- python train_job/run.py`, and with
`--working-dir .`. Exit codes: 0 done, 1 training failed (a full disk included), 2 the input was wrong, 130 or 143
stopped by a signal.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0]).resolve() == ROOT / "train_job":  # run as a script: our modules are train_job.*, not top-level
    sys.path[0] = str(ROOT)

import train_job.environment  # noqa: E402, F401  # first: it sets what libraries read when they are imported
from gptcore.errors import FoundryError  # noqa: E402
from gptcore.progress import doing  # noqa: E402
from train_job.cli import parse_settings  # noqa: E402
from train_job.cluster.connect import ray_cluster, require_room, resources_per_worker  # noqa: E402
from train_job.config import TrainConfig  # noqa: E402
from train_job.session.begin import begin  # noqa: E402
from train_job.session.console import Console  # noqa: E402
from train_job.session.exit_code import as_problem, exit_code  # noqa: E402
from train_job.session.record import RUN, read_record, tracked_at  # noqa: E402
from train_job.session.stop import StopSignals  # noqa: E402

if TYPE_CHECKING:
    from train_job.cluster.training import Training
    from train_job.data.inputs import Inputs
    from train_job.session.session import Session


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit code."""

    def job() -> int:
        given = parse_settings(sys.argv[1:] if argv is None else argv)
        with begin(given) as (config, run_dir):
            return TrainingJob(config, run_dir).execute()

    return exit_code(job)


class TrainingJob:
    """One run from command line to registry. A stop signal may come at any time, so it knows how far it has got."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._stops = StopSignals(self._stop)
        self._session: Session | None = None
        self._training: Training | None = None

    def execute(self) -> int:
        """Plans, trains and registers; returns the exit code. Raises FoundryError for wrong input."""
        from train_job.cluster.prepare import prepare_on_cluster
        from train_job.session.finish import ended_with
        from train_job.session.report import show_again
        from train_job.tracking.client import check_server, check_user, import_beside
        from train_job.tracking.registry import pin

        if ended := ended_with(self._run_dir, self._config):
            return show_again(self._config, self._run_dir, *ended)
        record = read_record(self._run_dir / RUN)
        self._uri = tracked_at(record)
        check_server(self._uri)
        if self._config.init_from:
            self._config = replace(self._config, init_from=pin(self._config.init_from, self._uri))
        with contextlib.ExitStack() as stack:
            running: list[tuple[Any, bool]] = []

            def cluster(workers: int = 0) -> tuple[Any, bool]:
                """Wrong input should not have to wait for Ray: it starts for much text, or when all is well."""
                if not running:
                    running.append(stack.enter_context(ray_cluster(workers)))
                return running[0]

            with doing("preparing the text"):
                inputs = prepare_on_cluster(self._config, cluster, record.text if record else None)
            self._config = inputs.config
            check_user(self._uri)
            import_beside(self._uri)
            ray, own_ray = cluster(0 if self._config.use_gpu else self._config.workers[0])
            resources = resources_per_worker(self._config, ray.nodes(), own_ray)
            if own_ray and not self._config.use_gpu:
                require_room(self._config, inputs.model, inputs.parent)
            self._console = stack.enter_context(contextlib.closing(Console(self._run_dir)))
            stack.enter_context(self._stops)
            try:
                return self._run(ray, own_ray, inputs, resources)
            except BaseException as error:
                return self._end_early(error)

    def _run(self, ray: Any, own_ray: bool, inputs: Inputs, resources: dict[str, float]) -> int:
        from train_job.cluster.training import Training
        from train_job.session.finish import finish
        from train_job.session.session import open_session

        with doing("opening the run in MLflow"):
            self._session = open_session(inputs, self._run_dir, self._uri, self._console, self._stops)
        self._training = Training(self._session, resources, own_ray)
        self._training.introduce(ray.nodes())
        for _ in self._training.run(ray):
            pass
        with doing("finishing the run"):
            return finish(self._session, self._training.trained)

    def _stop(self) -> None:
        """What a signal does at once; everything else happens where the job checks for a stop."""
        from train_job.session.finish import end

        if self._training:
            self._training.stop()
        what = "saving a checkpoint" if self._training and self._training.began else "finishing what is in hand"
        self._console.say(f"stopping: {what} (once more to leave at once)")
        if self._session:
            end(self._session, "KILLED")  # now: whoever stopped us may not wait

    def _end_early(self, error: BaseException) -> int:
        """Records a run that was stopped or failed; returns its exit code. Raises `error` if it is a defect."""
        from train_job.session.finish import end, fail, failure_code
        from train_job.session.report import what_now
        from train_job.session.session import Trained, resume_command

        session, say = self._session, self._console.say
        # A signal to the whole process group ends Ray too, and then anything may be raised.
        if isinstance(error, KeyboardInterrupt) or self._stops.number:
            if session:
                end(session, "KILLED")
            say(f"stopped; go on with: {resume_command(self._config)}")
            if session:
                what_now(session)
            return 128 + self._stops.number
        problem = as_problem(error, self._run_dir) if isinstance(error, (FoundryError, OSError)) else None
        if problem and session:
            return fail(session, self._training.trained if self._training else Trained(), problem)
        if session:
            end(session, "FAILED")  # whatever it is, the run must not be left as running
        if not problem:
            raise error
        say(f"error: {problem}")
        return failure_code(problem, began=False)


if __name__ == "__main__":
    sys.exit(main())
