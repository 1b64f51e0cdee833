"""The scene of training: a home, a cluster that can be replaced, runs, and what is promised of their ends."""

import contextlib
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from tests.chaos.fault import Result
from tests.system.conftest import Cluster, Job, Launch, launching, started
from tests.system.runs import mlflow_client, points, versions, weights
from tests.system.runs import status as status_of
from tests.waiting import eventually
from train_job.session.history import read_history

LOG_STEPS = 5
LONG, SHORT = 1500, 600
"""Steps of the run that is killed twenty times, and of the others."""
END_SECONDS = 300.0
SHIM = Path(__file__).parent / "shim"


@dataclass
class Run:
    """A job that is under way, what it has said, and how far it is."""

    job: Job
    steps: int
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
    undisturbed: dict[int, Run] = field(default_factory=dict)
    """The runs that nothing happens to, by their number of steps."""
    names: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Site":
        self._stack = ExitStack()
        self._shim = {"PYTHONPATH": str(SHIM), "CHAOS_SHIM": str(self.scratch / "shim.json")}
        self.new_cluster()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def new_cluster(self, **env: str) -> None:
        """Ends the cluster, with all that runs on it, and starts another, with these variables on its nodes."""
        self._stack.close()
        self.cluster: Cluster = self._stack.enter_context(started(self.home, **self._shim, **env))
        self._launch: Launch = self._stack.enter_context(launching(self.cluster, self.text))

    def name(self, kind: str) -> str:
        """A new name for a run."""
        self.names[kind] += 1
        return f"{kind}-{self.names[kind]}"

    def launch(self, name: str, *flags: str, steps: int = SHORT, **env: str) -> Run:
        flags = (f"--max-steps={steps}", "--max-failures=-1", *flags)
        return Run(self._launch(name, *flags, **self._shim, **env), steps)

    def resume(self, run: Run, **env: str) -> Run:
        name = run.job.run_dir.name
        return Run(self._launch(name, f"--resume={name}", **self._shim, **env), run.steps)

    def reference(self, steps: int = SHORT) -> Run:
        """A run of so many steps that nothing happens to."""
        if steps not in self.undisturbed:
            run = self.launch(self.name("undisturbed"), steps=steps)
            code, output = run.finish()
            assert code == 0, output
            self.undisturbed[steps] = run
        return self.undisturbed[steps]

    @contextlib.contextmanager
    def disturbed(self, **settings: float) -> Iterator[None]:
        """Within the block, every Python process of the scene has another clock or slower writes: see shim."""
        file = Path(self._shim["CHAOS_SHIM"])
        file.with_suffix(".new").write_text(json.dumps(settings))
        file.with_suffix(".new").replace(file)
        try:
            yield
        finally:
            file.unlink()

    def was_disturbed(self, setting: str) -> bool:
        """Whether that setting has had an effect in any process so far."""
        return Path(f"{self._shim['CHAOS_SHIM']}.{setting}").exists()

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
    result.unit, result.touched = "steps", result.touched + run.steps
    mine, theirs = weights(run.job), weights(reference.job)
    other = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    result.expect(not other, f"{len(other)} of {len(theirs)} tensors differ")
    told = Counter(step for step, _ in points(run.job, "train/loss"))
    expected = range(LOG_STEPS, run.steps + 1, LOG_STEPS)
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


def at_once(claim: Callable[[], bool], what: str) -> None:
    """Waits for something that lasts for some milliseconds."""
    deadline = time.monotonic() + END_SECONDS
    while not claim():
        assert time.monotonic() < deadline, f"not within {END_SECONDS:g} s: {what}"
        time.sleep(0.002)


def go_on(site: Site, run: Run, result: Result) -> Run:
    """Resumes a run that has ended, until it tells a step that it had not told before."""
    moment, before = time.monotonic(), run.step
    again = site.resume(run)
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
