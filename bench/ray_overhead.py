"""Measures Ray's overhead: steady-state tokens/s of the job and of the bare loop, with the same config.

`python -m bench.ray_overhead` starts both and lets them run in turn. While one runs, all processes of the other one are
suspended, including Ray's. The machine's speed drifts by more than the overhead, and this way the drift affects both.
Turns are long, because Ray catches up on missed timers after it is resumed. Each pair of turns gives a ratio; the
report has the median.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.time_to_quality import parse_change
from gptcore.devices import pick_device
from gptcore.errors import FoundryError
from train_job.config import build_config
from train_job.data.inputs import build_model, prepare_inputs
from train_job.training.events import Progress
from train_job.training.hardware import WORKER_ENV
from train_job.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 20
"""Log intervals of warm-up. By then the job's worker has imported MLflow and delivered its first points."""


def main(argv: list[str] | None = None) -> int:
    """Measures, and prints the ratio job / bare as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.ray_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="corpus, as for train_job/run.py")
    parser.add_argument("--turns", type=int, default=6, help="turns of each")
    parser.add_argument("--seconds", type=float, default=25.0, help="length of a turn")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change from their defaults"
    )
    arguments = parser.parse_args(argv)
    try:
        changes = dict(map(parse_change, arguments.set))
        build_config(changes)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings: dict[str, Any] = dict(
        data=arguments.data, max_steps=10**6, eval_interval=10**6, log_interval=4, sample_tokens=0
    )
    settings |= changes
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        with bare_loop(settings, home) as (bare, bare_rates):
            await_warm_up(bare, bare_rates)
            pause(bare)
            with ray_job(settings, home) as (job, job_rates):
                await_warm_up(job, job_rates)
                seen: list[tuple[float, float]] = []
                for _ in range(arguments.turns):
                    seen.append((turn(job, job_rates, arguments.seconds), turn(bare, bare_rates, arguments.seconds)))
    ratios = [ours / theirs for ours, theirs in seen]
    report = {
        "bench": "ray_overhead",
        "job_tokens_per_second": round(statistics.median(ours for ours, _ in seen)),
        "bare_tokens_per_second": round(statistics.median(theirs for _, theirs in seen)),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    print(json.dumps(report))
    return 0


Rates = Callable[[], list[float]]


@contextlib.contextmanager
def bare_loop(settings: dict[str, Any], home: Path) -> Iterator[tuple[psutil.Process, Rates]]:
    """Runs the loop in its own process. The second value returns its tokens/s in each log interval so far."""
    command = [sys.executable, "-m", "bench.ray_overhead", "bare", json.dumps(settings | {"cache_dir": str(home)})]
    output = home / "bare.txt"
    with output.open("w") as file, running(command, WORKER_ENV, file) as process:
        yield process, lambda: [float(line) for line in output.read_text().splitlines()]


@contextlib.contextmanager
def ray_job(settings: dict[str, Any], home: Path) -> Iterator[tuple[psutil.Process, Rates]]:
    """Runs the job as a user starts it. The second value returns the tokens/s in its spool so far."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    env = {"GPT_FOUNDRY_HOME": str(home), "RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": ""}
    spool = home / "runs" / "measured" / "spool" / "lines.jsonl"

    def rates() -> list[float]:
        lines = spool.read_text().split("\n")[:-1] if spool.exists() else []
        points = (json.loads(line).get("values", {}) for line in lines)
        return [values["tokens_per_second"] for values in points if "tokens_per_second" in values]

    command = [sys.executable, "train_job/run.py", *flags, "--name=measured"]
    with running(command, env, subprocess.DEVNULL) as process:
        yield process, rates


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], output: Any) -> Iterator[psutil.Process]:
    """Starts a process, and kills it with all its children at the end. Its stderr is shown as it comes."""
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=output)
    process = psutil.Process(child.pid)
    try:
        yield process
    finally:
        for one in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        child.wait()


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants."""
    return [process, *process.children(recursive=True)] if process.is_running() else []


def await_warm_up(process: psutil.Process, rates: Rates) -> None:
    """Waits until the process has finished its warm-up intervals."""
    while len(rates()) < WARM_UP:
        if process.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit(f"{' '.join(process.cmdline()) or 'the process'} ended before it was measured")
        time.sleep(0.5)


def pause(process: psutil.Process) -> None:
    """Suspends the process and all its descendants."""
    for one in family(process):
        one.suspend()


def turn(process: psutil.Process, rates: Rates, seconds: float) -> float:
    """Resumes the process for some seconds. Returns its tokens/s over the intervals that ended in that time.

    The first of these intervals contains the pause and does not count. If no other one has ended, as on a busy machine,
    the process runs on until one has. All intervals have the same number of tokens, so the harmonic mean of their rates
    is the total tokens over the total time.
    """
    before = len(rates())
    for one in family(process):
        one.resume()
    time.sleep(seconds)
    while len(rates()) < before + 2 and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    pause(process)
    return statistics.harmonic_mean(rates()[before + 1 :])


def print_bare(settings: dict[str, Any]) -> None:
    """Trains, and prints the tokens/s of every log interval, one per line."""
    config = build_config(settings)
    inputs = prepare_inputs(config)
    trainer = Trainer(
        config, build_model(config, inputs.model), inputs.train, inputs.validation, pick_device(config.device)
    )
    for event in trainer.run():
        if isinstance(event, Progress):
            print(event.tokens_per_second, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        print_bare(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
