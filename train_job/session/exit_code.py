"""From a job to its exit code: what the user can fix becomes one line, anything else a traceback."""

import signal
import sys
from collections.abc import Callable

from gptcore.errors import FoundryError, StorageFull
from gptcore.home import home
from gptcore.progress import doing
from train_job.files import storage_problem
from train_job.session.console import lasting_output


def exit_code(job: Callable[[], int]) -> int:
    """Runs `job` and returns its exit code: 2 if the input was wrong, 1 if the disk is full, 128 + N if stopped."""
    with lasting_output(), doing("getting ready"):
        try:
            return job()
        except (FoundryError, OSError) as error:
            problem = as_problem(error, home())
            if problem is None:
                raise
            print(f"error: {problem}", file=sys.stderr)
            return 1 if isinstance(problem, StorageFull) else 2
        except KeyboardInterrupt as stop:  # before the run was opened
            print("stopped", file=sys.stderr)
            return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def as_problem(error: Exception, place: object) -> FoundryError | None:
    """The error that one line can show, naming `place` if it names no path itself; None if only a traceback will do."""
    return error if isinstance(error, FoundryError) else storage_problem(error, getattr(error, "filename", "") or place)
