"""Measures startup times: a job of twenty steps, `serve run`, a second replica, a reload, `gptcore.generate`, an error.

`python -m bench.startup` runs each of them several times as a user would. It prints a table with the phases of the
median try of each, and one JSON line last. A phase begins when a function of the job is entered, or when one of Ray's
processes appears. A service is measured until it is ready, a second replica from when its process has its name until
it listens, while a client keeps the first one busy, a reload from when the alias moves to another version until that
one answers, `gptcore.generate` until it prints its first token, and the error of a mistyped flag until the job ends.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from gptcore.cli import heed_interrupts

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
Marks = list[tuple[str, float]]
"""(phase, when it began in seconds since the process was started)."""
FIRST = "Python starts, and the command's imports"
TRACED_FUNCTIONS = (
    ("train_job.run", "begin", "flags are read, Ray imported, the text tokenised"),
    ("ray", "init", "Ray starts; MLflow is imported"),
    ("train_job.session.session", "open_session", "MLflow's run is opened"),
    ("train_job.cluster.training", "Training.introduce", "the plan is printed"),
    ("train_job.cluster.training", "torch_trainer", "Ray Train starts"),
    ("train_job.session.finish", "build", "the package is written"),
    ("train_job.session.finish", "_figures", "figures are drawn"),
    ("train_job.tracking.registry", "publish", "the version is registered and tested"),
    ("train_job.session.finish", "show", "the sample and the summary are printed"),
    ("train_job.session.finish", "close", "MLflow's run is closed"),
    ("ray", "shutdown", "Ray ends"),
)
"""(module, function, the phase that begins when the function is first entered)."""
EVENTS = {"Started": "20 steps, an evaluation, a checkpoint", "Finished": "Ray Train ends"}
"""The worker's events and the phase that each one begins. Events reach the driver within a second."""
PROCESSES = (
    ("gcs_server", "Ray starts"),
    ("ServeController", "Serve's controller starts"),
    ("ServeReplica", "a replica starts, imports, loads the model, warms it up; the front starts"),
)
"""(name of one of Ray's processes, the phase that begins when it appears)."""
READY_SECONDS = 300
SERVICE_LOG = "serve.log"
LISTENS = re.compile(r"INFO (\S+ \S+) .* Started HTTP server on port")
"""What a replica of Serve logs once the model is loaded, and when."""


def main(argv: list[str] | None = None) -> int:
    """Measures, and prints tables and a JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="how often each is run; the median try counts")
    parser.add_argument("--steps", type=int, default=20, help="steps of the run")
    arguments = parser.parse_args(argv)
    load = os.getloadavg()[0]
    found: dict[str, list[Marks]] = {}
    from bench.weights import random_package  # imports torch, which the traced job does in its own time

    for turn in range(arguments.times):
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
            home = Path(scratch)
            package, large = home / "runs" / f"measured-{turn}" / "package", home / "large"
            measured = {
                "run": run(home, f"--name=measured-{turn}", f"--max-steps={arguments.steps}"),
                "serve": serve(home, package),
                "serve 124M": serve(home, random_package(large, "gpt2-124m").path),
                "second replica": second_replica(home, package),
                "reload": reload(home, package),
                "generate": generate(home, package),
                "error": run(home, "--nmae=measured", code=2),
            }
        for what, marks in measured.items():
            found.setdefault(what, []).append(marks)
    report = {what: phases(median_try(tries)) for what, tries in found.items()}
    for what, seconds in report.items():
        print(f"\n{what}: {sum(seconds.values()):.1f} s")
        for phase, took in seconds.items():
            print(f"{took:6.1f}  {phase}")
    print(json.dumps({"bench": "startup", "load_before": round(load, 1), **report}))
    return 0


def median_try(tries: list[Marks]) -> Marks:
    """The try whose whole time is the median; of an even number of tries, the slower one of the middle two."""
    return sorted(tries, key=lambda marks: marks[-1][1])[len(tries) // 2]


def phases(marks: Marks) -> dict[str, float]:
    """The seconds of each phase, in order. The last mark is the end."""
    seconds: dict[str, float] = {}
    for (phase, begun), (_, ended) in itertools.pairwise(marks):
        seconds[phase] = round(seconds.get(phase, 0.0) + ended - begun, 2)
    return seconds


def environment(home: Path) -> dict[str, str]:
    """The user's environment, but with a separate Ray and MLflow."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPT_", "MLFLOW_", "RAY_"))}
    return kept | {"GPT_FOUNDRY_HOME": str(home), "RAY_ADDRESS": "local"}


def run(home: Path, *flags: str, code: int = 0) -> Marks:
    """Runs `train_job/run.py` with these flags. Raises RuntimeError if its exit code is not `code`."""
    file = home / "marks.json"
    file.write_text("[]")
    begun = time.time()
    command = [sys.executable, "-m", "bench.startup", "traced", str(file), *flags]
    ended = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True)
    total = time.time() - begun
    if ended.returncode != code:
        raise RuntimeError(f"the job ended with {ended.returncode}, not {code}:\n{ended.stdout}{ended.stderr}")
    marks = [(str(phase), at - begun) for phase, at in json.loads(file.read_text())]
    return [(FIRST, 0.0), *marks, ("", total)]


def traced(file: Path, flags: list[str]) -> int:
    """Runs the job in this process, and writes to `file` when each phase began, in seconds since 1970."""
    marks: Marks = []

    def mark(phase: str) -> None:
        if phase not in [known for known, _ in marks]:
            marks.append((phase, time.time()))

    def after(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            mark(phase)
            return function(*arguments, **named)

        return marked

    from train_job.run import TrainingJob
    from train_job.run import main as job

    execute = TrainingJob.execute

    def trace_functions(names: Callable[[str], bool]) -> None:
        for module, path, phase in TRACED_FUNCTIONS:
            if names(module):
                *above, name = path.split(".")
                owner = functools.reduce(getattr, above, importlib.import_module(module))
                setattr(owner, name, after(getattr(owner, name), phase))

    def executed(self: TrainingJob) -> int:
        from train_job.cluster.training import Training

        trace_functions(lambda module: module != "train_job.run")  # modules that the job imports only now
        show = Training._show

        def shown(self: Training, events: list[Any]) -> list[Any]:
            for event in events:
                if type(event).__name__ in EVENTS:
                    mark(EVENTS[type(event).__name__])
            return show(self, events)

        Training._show = shown  # type: ignore[method-assign]
        return execute(self)

    trace_functions(lambda module: module == "train_job.run")
    TrainingJob.execute = executed  # type: ignore[method-assign]
    code = job(flags)
    mark("Python ends" if code == 0 else "the error is printed")
    file.write_text(json.dumps(marks))
    return code


def serve(home: Path, package: Path) -> Marks:
    """Runs `serve run serve_app:app` with a package until it is ready. Raises RuntimeError if it never is."""
    with service(home, str(package)) as (_, marks):
        return marks


def second_replica(home: Path, package: Path) -> Marks:
    """Keeps one replica busy, and waits until a second one listens, from when its process is named as one.

    Raises RuntimeError if there never is one.
    """
    from bench.autoscaling import count_replicas  # imports torch

    settings = {"GPT_MAX_REPLICAS": "2", "GPT_TARGET_ONGOING_REQUESTS": "0.1", "GPT_UPSCALE_DELAY_S": "0"}
    with service(home, str(package), settings) as (port, _):
        begun, stop = time.time(), threading.Event()

        def keep_busy() -> None:
            while not stop.is_set():
                answered_by(port)

        client = threading.Thread(target=keep_busy)
        client.start()
        try:
            named = 0.0
            while len(listening := LISTENS.findall((home / SERVICE_LOG).read_text())) < 2:
                named = named or (time.time() if count_replicas(psutil.Process()) > 1 else 0.0)
                if time.time() - begun > READY_SECONDS:
                    raise RuntimeError(f"after {READY_SECONDS} s there is no second replica")
                time.sleep(0.05)
        finally:
            stop.set()
            client.join()
        listens = max(datetime.strptime(said, "%Y-%m-%d %H:%M:%S,%f").timestamp() for said in listening)
        return [("a second replica", 0.0), ("", listens - named)]


def reload(home: Path, package: Path) -> Marks:
    """Serves gpt@champion, moves the alias to a new version of the same package, and waits until that one answers."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    with service(home, "models:/gpt@champion") as (port, _):
        made = client.create_model_version("gpt", package.as_uri())
        begun = time.time()
        client.set_registered_model_alias("gpt", "champion", made.version)
        while answered_by(port) != f"gpt/{made.version}":
            if time.time() - begun > READY_SECONDS:
                raise RuntimeError(f"after {READY_SECONDS} s {answered_by(port)} still answers, not gpt/{made.version}")
            time.sleep(0.05)
        return [("a reload", 0.0), ("", time.time() - begun)]


def generate(home: Path, package: Path) -> Marks:
    """Runs `python -m gptcore.generate` until it has printed the first token."""
    command = [sys.executable, "-m", "gptcore.generate", str(package), "--prompt", "The", "--max-new-tokens", "1"]
    begun = time.time()
    with subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE) as it:
        assert it.stdout
        text = it.stdout.read(len("The") + 1)
        took = time.time() - begun
        it.stdout.read()  # it is done by then; with its pipe closed it would fail
    if it.returncode or len(text) <= len("The"):
        raise RuntimeError(f"gptcore.generate printed {text!r} and ended with {it.returncode}")
    return [(FIRST + ", the model, a token", 0.0), ("", took)]


@contextlib.contextmanager
def service(home: Path, model: str, settings: Mapping[str, str] | None = None) -> Iterator[tuple[int, Marks]]:
    """Runs `serve run serve_app:app` with these variables; yields its port and phases once it is ready.

    Raises RuntimeError if it never is.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = environment(home) | {"GPT_MODEL": model, "GPT_PORT": str(port)} | dict(settings or {})
    heed_interrupts()  # or the service would not end
    log, command = home / SERVICE_LOG, [str(BIN / "serve"), "run", "serve_app:app"]
    begun = time.time()
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output) as it:
        marks: Marks = [(FIRST, 0.0)]
        try:
            while not ready(port):
                if it.poll() is not None or time.time() - begun > READY_SECONDS:
                    raise RuntimeError(f"the service is not ready:\n{log.read_text()}")
                marks += [(phase, at - begun) for phase, at in appeared(it.pid) if phase not in dict(marks)]
                time.sleep(0.05)
            yield port, [*marks, ("", time.time() - begun)]
        finally:
            it.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                it.wait(60)
            it.kill()


def appeared(pid: int) -> Iterator[tuple[str, float]]:
    """The phases whose process exists, and when that process started, in seconds since 1970."""
    with contextlib.suppress(psutil.Error):
        named = [(process, " ".join(process.cmdline())) for process in psutil.Process(pid).children(recursive=True)]
        for name, phase in PROCESSES:
            since = [process.create_time() for process, command in named if name in command]
            if since:
                yield phase, min(since)


def ready(port: int) -> bool:
    """Whether the service's default model is warm."""
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).status == 200)
    return False


def answered_by(port: int) -> str:
    """The model and version that answers a request, as gpt/2."""
    body = json.dumps({"prompt": "The", "max_new_tokens": 1}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(reply.headers["x-model-version"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["traced"]:
        sys.exit(traced(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
