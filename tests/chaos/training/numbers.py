"""Numbers of a run that turn bad: a loss that is none, and the time of day."""

import random
import re
import time

from tests.chaos.fault import Result
from tests.chaos.training.site import Site, ended, finished
from tests.system.runs import status
from train_job.training.checkpoint import verified


def not_a_number(site: Site, rng: random.Random) -> Result:
    """A learning rate that makes the weights overflow."""
    result = Result(times=1, unit="steps")
    run = site.launch(site.name("nan"), f"--learning-rate=1e{rng.randint(25, 37)}", "--warmup-steps=100")
    _, output = ended(result, run, "the loss was not a number")
    found = re.search(r"the (loss|gradient norm) is (nan|inf) at step (\d+)", output)
    result.expect(bool(found), f"it does not name the step: {output[-3000:]}")
    result.touched = run.step
    for checkpoint in run.job.run_dir.glob("checkpoint_*/"):
        verified(checkpoint)
    result.expect(status(run.job) == "FAILED", f"the run is {status(run.job)}")
    return result


def clock_moved(site: Site, rng: random.Random) -> Result:
    """The time of day jumps while a run is under way."""
    reference, result = site.reference(), Result(unit="steps")
    run = site.launch(site.name("clock"))
    for seconds in (-3600, 3600):
        run.await_step(run.step + rng.randint(5, 60))
        before, moment = run.step, time.monotonic()
        with site.disturbed(clock_seconds=seconds):
            run.await_step(before + rng.randint(20, 60))
        result.recovery.append(time.monotonic() - moment)
        result.times += 1
    finished(result, run, reference)
    result.expect(site.was_disturbed("clock_seconds"), "no process saw another time")
    return result
