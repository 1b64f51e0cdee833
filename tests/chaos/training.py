"""Faults of training. What is promised: a run that is killed, or whose disk or server fails, can always go on.

Its final weights are then those of a run that nothing happened to, to the bit. It is one MLflow run, which has every
step once, and one registered version. What cannot go on says so in one line and keeps the last good checkpoint.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from gptcore.errors import CheckpointError
from gptcore.files import DRAFT
from tests.chaos.fault import Fault, Result
from tests.chaos.gate import Gate, every, garbage, slow, status
from tests.system.conftest import Cluster, Job, Launch, launching, started
from tests.system.runs import mlflow_client, points, versions, weights
from tests.system.runs import status as status_of
from tests.system.serving import family, name_of
from tests.system.tracking import TrackingServer
from tests.waiting import eventually
from train_job.session.history import read_history
from train_job.training.checkpoint import STATE, verified

LOG_STEPS = 5
STEPS = 3000
FLAGS = (f"--max-steps={STEPS}", "--max-failures=-1")
END_SECONDS = 300.0


@dataclass
class Run:
    """A job that is under way, what it has said, and how far it is."""

    job: Job
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.job.process.stdout
        self.said.extend(self.job.process.stdout)

    @property
    def step(self) -> int:
        """The last step that it has told."""
        rows = read_history(self.job.run_dir / "history.jsonl")
        return int(max((row["step"] for row in rows), default=0))

    @property
    def ended(self) -> bool:
        return self.job.process.poll() is not None

    @property
    def output(self) -> str:
        return "".join(self.said)

    def await_step(self, step: int) -> None:
        """Waits until that step is told. Fails with the output if the job ends before."""
        eventually(lambda: self.step >= step or self.ended, f"step {step}; {self.output[-2000:]}", END_SECONDS)
        assert self.step >= step, f"it ended at step {self.step}, before {step}:\n{self.output[-4000:]}"

    def finish(self) -> tuple[int, str]:
        """(exit code, output) once it has ended."""
        code = self.job.process.wait(END_SECONDS)
        self._reader.join()
        return code, self.output

    def kill(self) -> None:
        self.job.process.kill()
        self.job.process.wait()


@dataclass
class Site:
    """A home with runs, and a cluster that can be taken away and started again."""

    home: Path
    text: Path
    scratch: Path
    undisturbed: Run | None = None
    names: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Site":
        self._stack = ExitStack()
        self.new_cluster()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def new_cluster(self) -> None:
        """Ends the cluster, with all that runs on it, and starts another."""
        self._stack.close()
        self.cluster: Cluster = self._stack.enter_context(started(self.home))
        self._launch: Launch = self._stack.enter_context(launching(self.cluster, self.text))

    def name(self, kind: str) -> str:
        """A new name for a run."""
        self.names[kind] += 1
        return f"{kind}-{self.names[kind]}"

    def launch(self, name: str, *flags: str, **env: str) -> Run:
        return Run(self._launch(name, *flags, **env))

    def resume(self, name: str, **env: str) -> Run:
        return self.launch(name, f"--resume={name}", **env)

    def reference(self) -> Run:
        """A run that nothing happens to."""
        if not self.undisturbed:
            self.undisturbed = self.launch(self.name("undisturbed"), *FLAGS)
            code, output = self.undisturbed.finish()
            assert code == 0, output
        return self.undisturbed

    def workers(self) -> list[psutil.Process]:
        """The workers that train this home's runs."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("GPT_FOUNDRY_HOME") == str(self.home):
                        found.append(process)
        return found

    def kill_workers(self, result: Result) -> None:
        """Kills them all. There is at least one."""
        workers = self.workers()
        result.expect(bool(workers), "no worker was found to kill")
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@contextlib.contextmanager
def site(scratch: Path) -> Iterator[Site]:
    """A home, a text, a cluster."""
    text, home = scratch / "rhyme.txt", scratch / "home"
    home.mkdir(parents=True)
    text.write_text("".join(f"{n} green bottles hanging on the wall, take {n % 7} down.\n" for n in range(300)))
    with Site(home, text, scratch) as found:
        yield found


def compare(result: Result, run: Run, reference: Run) -> Result:
    """Notes what the run lacks of what was promised."""
    result.unit, result.touched = "steps", result.touched + STEPS
    mine, theirs = weights(run.job), weights(reference.job)
    other = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    result.expect(not other, f"{len(other)} of {len(theirs)} tensors differ")
    told = Counter(step for step, _ in points(run.job, "train/loss"))
    expected = range(LOG_STEPS, STEPS + 1, LOG_STEPS)
    missing = [step for step in expected if step not in told]
    twice = [step for step, count in told.items() if count > 1]
    result.lost += len(missing) + len(twice) + len(other)
    result.expect(not missing, f"steps {missing[:5]} are missing")
    result.expect(not twice, f"steps {twice[:5]} were logged twice")
    client, name = mlflow_client(run.job), run.job.run_dir.name
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()], f"attributes.run_name = '{name}'"
    )
    result.expect(len(runs) == 1, f"{len(runs)} MLflow runs")
    made = versions(run.job)
    result.expect(len(made) == 1, f"{len(made)} versions")
    result.expect(status_of(run.job) == "FINISHED", f"the run is {status_of(run.job)}")
    return result


# --- killed -----------------------------------------------------------------------------------------------------


def kills(site: Site, rng: random.Random, count: int = 20) -> Result:
    """SIGKILL of a worker, the driver or the raylet in one run; three of them at chosen moments."""
    reference, result, name = site.reference(), Result(unit="steps"), site.name("killed")
    at_random = [rng.choice(("worker", "worker", "driver", "raylet")) for _ in range(count - 3)]
    victims = [*at_random, "worker in a checkpoint"]
    rng.shuffle(victims)
    run = site.launch(name, *FLAGS)
    for victim in victims:
        run.await_step(run.step + rng.randint(5, 50))
        if victim.endswith("checkpoint"):
            at_once(lambda run=run: unfinished_checkpoint(run) or run.ended, "a checkpoint is being written")
        before, moment = run.step, time.monotonic()
        if victim.startswith("worker"):
            site.kill_workers(result)
        elif victim == "driver":
            run.kill()
            run = site.resume(name)
        else:
            for process in family(site.cluster):
                if name_of(process) == "raylet":
                    process.kill()
            _, output = ended(result, run, "the raylet was killed")
            result.expect("--resume" in output, "a job that lost its cluster does not say how to go on")
            site.new_cluster()
            run = site.resume(name)
        run.await_step(before + 1)
        result.recovery.append(time.monotonic() - moment)
        result.times += 1
    for moment_of, there in (("the package is written", package_begun), ("a version is registered", registering)):
        at_once(lambda run=run, there=there: there(run) or run.ended, moment_of)
        result.expect(not run.ended, f"the run ended before {moment_of}")
        run.kill()
        result.times += 1
        run = site.resume(name)
    return finished(result, run, reference)


def at_once(claim: Callable[[], bool], what: str) -> None:
    """Waits for something that lasts for some milliseconds."""
    deadline = time.monotonic() + END_SECONDS
    while not claim():
        assert time.monotonic() < deadline, f"not within {END_SECONDS:g} s: {what}"
        time.sleep(0.002)


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


def go_on(site: Site, run: Run, result: Result) -> Run:
    """Resumes a run that has ended, until it tells a step that it had not told before."""
    moment, before = time.monotonic(), run.step
    again = site.resume(run.job.run_dir.name)
    again.await_step(before + 1)
    result.recovery.append(time.monotonic() - moment)
    result.times += 1
    return again


def finished(result: Result, run: Run, reference: Run) -> Result:
    """Waits for the run's end, and compares it."""
    code, output = run.finish()
    result.expect(code == 0, f"the run ended with {code}: {output[-300:]}")
    return compare(result, run, reference)


def ended(result: Result, run: Run, why: str) -> tuple[int, str]:
    """Waits for a job that cannot go on. One that hangs is killed, and a promise broken."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code, output = run.finish()
        result.expect(code != 0, f"the job ended with 0 after {why}")
        result.expect("Traceback" not in output, f"a traceback after {why}: {output[-300:]}")
        return code, output
    result.expect(False, f"the job hung after {why}: {run.output[-300:]}")
    run.kill()
    return -1, run.output


def three_seconds(site: Site, rng: random.Random) -> Result:
    """SIGTERM, and SIGKILL of all that is left three seconds later."""
    reference, name, result = site.reference(), site.name("terminated"), Result(unit="steps")
    run = site.launch(name, *FLAGS)
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


# --- disks and files --------------------------------------------------------------------------------------------


def damaged_checkpoints(site: Site, rng: random.Random) -> Result:
    """Every file of a checkpoint, cut or with one bit changed, in each of ten regions."""
    run = site.reference()
    checkpoint = max(run.job.run_dir.glob("checkpoint_*/"), key=lambda folder: folder.stat().st_mtime)
    result = Result(unit="reads")
    for file in sorted(checkpoint.iterdir()):
        for region in range(10):
            for cut in (False, True):
                harmed = Path(shutil.copytree(checkpoint, site.scratch / "harmed"))
                content = bytearray((harmed / file.name).read_bytes())
                at = min(len(content) - 1, (region * len(content) + rng.randrange(len(content))) // 10)
                if cut:
                    del content[at:]
                else:
                    content[at] ^= 1 << rng.randrange(8)
                (harmed / file.name).write_bytes(content)
                result.times += 1
                result.touched += 1
                try:
                    verified(harmed)
                    result.lost += 1
                    result.expect(False, f"{file.name} with byte {at} {'cut off' if cut else 'changed'} was taken")
                except CheckpointError:
                    pass
                finally:
                    shutil.rmtree(harmed)
    return result


def full_disk(site: Site, rng: random.Random) -> Result:
    """A disk that fills up at different moments of a run, and has space again."""
    reference, name, result = site.reference(), site.name("full"), Result(unit="steps")
    disk = site.home / "runs" / name
    with small_disk(disk, "64m") as mounted:
        if not mounted:
            result.expect(False, "not tried: it takes root to mount a small disk")
            return result
        run = site.launch(name, *FLAGS)
        for _ in range(4):
            run.await_step(run.step + rng.randint(5, 60))
            ballast, leave = disk / "ballast", rng.choice((0, 1_000, 100_000, 1_000_000))
            deadline = time.monotonic() + END_SECONDS
            while not run.ended and time.monotonic() < deadline:
                fill(ballast, leave)  # again, as deleted checkpoints leave room
                time.sleep(0.05)
            _, output = ended(result, run, "the disk was full")
            result.expect("is full" in output, f"it does not say that the disk is full: {output[-300:]}")
            ballast.unlink()
            run = go_on(site, run, result)
        return finished(result, run, reference)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of that size at this folder until the block ends; False where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def fill(file: Path, leave: int) -> None:
    """Adds to a file until it leaves so many bytes of its disk."""
    with contextlib.suppress(OSError), file.open("ab") as out:
        space = os.statvfs(file.parent)
        out.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))


def changed_data(site: Site, rng: random.Random) -> Result:
    """The files of tokens are changed while a run reads them, and deleted before its worker is killed."""
    reference, name, result = site.reference(), site.name("data"), Result(unit="steps")
    run = site.launch(name, *FLAGS)
    for harm in rng.sample(("changed", "changed", "deleted", "deleted"), 4):
        run.await_step(run.step + rng.randint(5, 60))
        shards = list((site.home / ".cache" / "shards").glob("*.bin"))
        result.expect(bool(shards), "no files of tokens were found")
        before, moment = run.step, time.monotonic()
        for shard in shards:
            if harm == "deleted":
                shard.unlink()
            else:
                with shard.open("r+b") as file:  # in place: the run has it mapped
                    file.seek(rng.randrange(shard.stat().st_size))
                    file.write(b"\x00")
        if harm == "deleted":
            site.kill_workers(result)
            run.await_step(before + 1)
        else:
            eventually(lambda run=run: "was changed while it was in use" in run.output, "the run has noticed", 60)
            run.await_step(run.step + 1)
        result.recovery.append(time.monotonic() - moment)
        result.times += 1
    return finished(result, run, reference)


# --- the tracking server ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracking_server(site: Site) -> Iterator[Gate]:
    """A tracking server behind a gate."""
    folder = site.scratch / site.name("server")
    folder.mkdir()
    server = TrackingServer(folder)
    server.start()
    try:
        server.await_answer()
        with Gate(server.port) as gate:
            yield gate
    finally:
        server.kill()


OUTAGE_SECONDS = 20.0


def tracking(site: Site, rng: random.Random) -> Result:
    """The tracking server is away, answers 500, answers garbage, answers late, or fails every third call."""
    reference, result = site.reference(), Result(unit="steps")
    with tracking_server(site) as gate:
        ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "away": gate.away,
            "answering 500": lambda: gate.failing(status(500)),
            "answering garbage": lambda: gate.failing(garbage),
            "30 s late": lambda: gate.failing(slow(30)),
            "failing every third call": lambda: gate.failing(every(3, status(503))),
        }
        for way, fails in ways.items():
            run = site.launch(site.name("tracked"), *FLAGS, MLFLOW_TRACKING_URI=gate.uri)
            run.await_step(rng.randint(5, 60))
            before, met, until = run.step, gate.failed, time.monotonic() + OUTAGE_SECONDS
            with fails():
                eventually(lambda run=run, until=until: run.ended or time.monotonic() > until, "the outage ends", 60)
            result.expect(run.step > before, f"with the server {way} it took no step")
            result.expect(way == "away" or gate.failed > met, f"nothing was sent to the server {way}")
            moment = time.monotonic()
            finished(result, run, reference)
            result.recovery.append(time.monotonic() - moment)
            result.times += 1
    return result


def tracking_gone(site: Site, rng: random.Random) -> Result:
    """The tracking server goes in the middle of a run and is back only after its end."""
    reference, result, name = site.reference(), Result(times=1, unit="steps"), site.name("untracked")
    with tracking_server(site) as gate:
        run = site.launch(name, *FLAGS, MLFLOW_TRACKING_URI=gate.uri)
        run.await_step(rng.randint(5, 60))
        with gate.away():
            ended(result, run, "the tracking server had gone")
            result.expect("--resume" in run.output, "it does not say how to go on")
        moment = time.monotonic()
        run = site.resume(name, MLFLOW_TRACKING_URI=gate.uri)
        finished(result, run, reference)
        result.recovery.append(time.monotonic() - moment)
    return result


SAME = "identical weights, each step once, one MLflow run, one version"
FAULTS: Sequence[Fault] = [
    Fault("training", "kills", "kill -9 of a worker, the driver or the raylet, in one run", SAME, kills),
    Fault("training", "sigterm", "SIGTERM, and kill -9 three seconds later", SAME, three_seconds),
    Fault("training", "damage", "a checkpoint's file cut or one bit changed", "never read", damaged_checkpoints),
    Fault("training", "disk", "the disk is full", f"one line says so; after a resume {SAME}", full_disk),
    Fault("training", "data", "the tokens' files deleted or changed, and the worker killed", SAME, changed_data),
    Fault("training", "tracking", "the tracking server away, wrong, late, or failing every third call", SAME, tracking),
    Fault("training", "tracking-gone", "the tracking server gone to the end", f"after a resume {SAME}", tracking_gone),
]
