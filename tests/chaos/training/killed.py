"""Processes of a run that are killed: workers, drivers, raylets, hosts."""

import contextlib
import random
import signal
import subprocess
import time

import psutil

from gptcore.files import DRAFT
from tests.chaos.fault import Result
from tests.chaos.training.site import LONG, Run, Site, at_once, ended, finished, go_on
from tests.system.conftest import BIN, SMALL, Job
from tests.system.hosts import machines
from tests.system.serving import family, name_of, title
from train_job.training.checkpoint import STATE


def kills(site: Site, rng: random.Random, count: int = 20) -> Result:
    """SIGKILL of a worker, the driver or the raylet in one run; three of them at chosen moments."""
    reference, result, name = site.reference(LONG), Result(unit="steps"), site.name("killed")
    at_random = [rng.choice(("worker", "worker", "driver", "raylet")) for _ in range(count - 3)]
    victims = [*at_random, "worker in a checkpoint"]
    rng.shuffle(victims)
    run = site.launch(name, steps=LONG)
    for victim in victims:
        run.await_step(run.step + rng.randint(5, 50))
        if victim.endswith("checkpoint"):
            at_once(lambda run=run: unfinished_checkpoint(run) or run.ended, "a checkpoint is being written")
        before, moment = run.step, time.monotonic()
        if victim.startswith("worker"):
            site.kill_workers(result)
        elif victim == "driver":
            run.kill()
            run = site.resume(run)
        else:
            for process in family(site.cluster):
                if name_of(process) == "raylet":
                    process.kill()
            _, output = ended(result, run, "the raylet was killed")
            result.expect("--resume" in output, "a job that lost its cluster does not say how to go on")
            site.new_cluster()
            run = site.resume(run)
        run.await_step(before + 1)
        result.recovery.append(time.monotonic() - moment)
        result.times += 1
    for moment_of, there in (("the package is written", package_begun), ("a version is registered", registering)):
        at_once(lambda run=run, there=there: there(run) or run.ended, moment_of)
        result.expect(not run.ended, f"the run ended before {moment_of}")
        run.kill()
        result.times += 1
        run = site.resume(run)
    return finished(result, run, reference)


def unfinished_checkpoint(run: Run) -> bool:
    """Whether the newest checkpoint is not complete."""
    folders = sorted(run.job.run_dir.glob("checkpoint_*/"))
    return bool(folders) and not (folders[-1] / STATE).exists()


def package_begun(run: Run) -> bool:
    """Whether the package, or the draft of one, is there."""
    names = [entry.name for entry in run.job.run_dir.iterdir() if entry.is_dir()]
    return any(name == "package" or name.startswith(DRAFT) for name in names)


def registering(run: Run) -> bool:
    """Whether MLflow has said that it makes the version."""
    return "egistered model 'gpt'" in run.output or "reated version" in run.output


def three_seconds(site: Site, rng: random.Random) -> Result:
    """SIGTERM, and SIGKILL of all that is left three seconds later."""
    reference, name, result = site.reference(), site.name("terminated"), Result(unit="steps")
    run = site.launch(name)
    for _ in range(3):
        run.await_step(run.step + rng.randint(5, 60))
        run.job.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.job.process.wait(3)
        run.kill()
        for worker in site.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        run = go_on(site, run, result)
    return finished(result, run, reference)


def host_lost(site: Site, rng: random.Random) -> Result:
    """One of three hosts loses its network and all its processes: the one that trains."""
    reference, result, name = site.reference(), Result(times=1, unit="steps"), site.name("host")
    folder = site.scratch / name
    folder.mkdir()
    with machines(3, folder, head_cpus=0) as found:
        head = found.hosts[0]
        flags = [f"--data={site.text}", f"--name={name}", f"--max-steps={reference.steps}", "--max-failures=-1"]
        command = [BIN / "ray", "job", "submit", f"--address={found.cluster.dashboard}", "--"]
        process = head.popen(*command, "python", "train_job/run.py", *SMALL, *flags)
        run = Run(Job(process, head.home / "runs" / name, found.tracking.uri), reference.steps)
        run.await_step(rng.randint(25, 100))
        (host,) = [h for h in found.hosts if any("RayTrainWorker" in title(process) for process in h.processes())]
        before, moment = run.step, time.monotonic()
        host.die()
        run.await_step(before + 1)
        result.recovery.append(time.monotonic() - moment)
        return finished(result, run, reference)
