"""Compares the service's speed with the engine's: `python -m bench.serve --concurrency 1 4 16`.

Starts the service with `serve run` (its own Ray, loopback, a free port), and a simple app around transformers'
`generate`. Sends the same requests in turn to both, and to the engine alone in a client's process. The model has the
preset's shape and random weights; decoding is greedy and no token ends a text. It reports tokens per second, the time
to the first text and the time between texts, as the client sees them. Run nothing else at the same time. It prints one
JSON line last.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from bench.decode import machine
from bench.load import Load, Reply, figures, first_token_seconds, open_engine, open_service, tokens_per_second
from bench.turns import Contestant, Results, cores, median_ratio, run_in_turn
from bench.weights import random_package
from gptcore.cli import heed_interrupts
from gptcore.engine import EngineSettings
from gptcore.errors import FoundryError
from gptcore.package import describe

SERVICE, ENGINE, NAIVE, VLLM = "service", "engine", "naive", "vllm"
VLLM_BIN = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin"
START_SECONDS, STOP_SECONDS = 300, 60


def main(argv: list[str] | None = None) -> int:
    """Prints a table and the JSON line. Returns 1 if a request failed, 2 for bad input."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the services are stopped
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
            report = measure(arguments, Path(scratch))
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    failed = sum(one["errors"] for level in report["concurrency"].values() for one in level["contestants"].values())
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m", help="shape of the model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="streams at once")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="precision of every contestant"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128, help="mean length of an answer")
    parser.add_argument("--requests", type=int, default=1, help="requests per stream in a turn, one after the other")
    parser.add_argument("--turns", type=int, default=3, help="rounds that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of every contestant")
    parser.add_argument("--no-naive", action="store_true", help="do not measure the app around transformers")
    parser.add_argument("--vllm", action="store_true", help="also measure the service with vLLM, from .venv-vllm")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures everything, and returns the report."""
    package = random_package(scratch / "package", arguments.preset)
    hardware = machine(arguments.threads, "cpu")
    load = Load(
        package=str(package.path),
        concurrency=1,
        requests=arguments.requests,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
    )
    print(describe(package).splitlines()[0])
    print(f"{hardware['cpu']}, {arguments.threads} threads, {arguments.dtype}", flush=True)
    with contextlib.ExitStack() as stack:
        urls = {SERVICE: stack.enter_context(service(load, arguments.dtype, scratch))}
        if not arguments.no_naive:
            urls[NAIVE] = stack.enter_context(naive_service(load, arguments.dtype, scratch))
        if arguments.vllm:
            urls[VLLM] = stack.enter_context(service(load, arguments.dtype, scratch, VLLM))
        levels = {}
        for concurrency in arguments.concurrency:
            task = Load(**{**load.__dict__, "concurrency": concurrency, "urls": urls})
            levels[str(concurrency)] = measure_level(task, arguments)
    settings = {name: getattr(load, name) for name in ("prompt_tokens", "new_tokens", "requests")}
    return {
        "bench": "serve",
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "machine": hardware,
        **settings,
        "turns": arguments.turns,
        "concurrency": levels,
    }


def measure_level(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the contestants in turn at one concurrency."""
    settings = EngineSettings(dtype=arguments.dtype, device="cpu", threads=load.threads, speculation=False)
    contestants = [
        Contestant(ENGINE, arguments.dtype, functools.partial(open_engine, settings=settings)),
        *(
            Contestant(name, arguments.dtype, functools.partial(open_service, name=name), ("aiohttp",))
            for name in load.urls
        ),
    ]
    results = run_in_turn(contestants, load, arguments.turns)
    found = {c.name: figures(results.turns[c.label]) for c in contestants if c.label in results.turns}
    compared = compare(results, {c.name: c.label for c in contestants if c.label in results.turns})
    print_level(load.concurrency, found, compared)
    return {"contestants": found, **compared, "absent": results.absent}


def compare(results: Results, labels: dict[str, str]) -> dict[str, float]:
    """Compares the service with the others, round by round. Shares are medians of ratios, the delay of differences."""
    turns: dict[str, list[list[Reply]]] = {name: results.turns[label] for name, label in labels.items()}
    rates = {name: list(map(tokens_per_second, of)) for name, of in turns.items()}
    turns = {name: of for name, of in turns.items() if all(rates[name])}  # without those that failed
    compared: dict[str, float] = {}
    if SERVICE in turns and ENGINE in turns:
        compared["of_engine"] = round(median_ratio(rates[SERVICE], rates[ENGINE]), 3)
        added = [
            statistics.median(first_token_seconds(a)) - statistics.median(first_token_seconds(b))
            for a, b in zip(turns[SERVICE], turns[ENGINE], strict=True)
        ]
        compared["first_token_added_ms"] = round(statistics.median(added) * 1e3, 2)
    if SERVICE in turns and NAIVE in turns:
        compared["of_naive"] = round(median_ratio(rates[SERVICE], rates[NAIVE]), 2)
    if SERVICE in turns and VLLM in turns:
        compared["of_vllm"] = round(median_ratio(rates[SERVICE], rates[VLLM]), 2)
    return compared


def print_level(concurrency: int, found: dict[str, dict[str, Any]], compared: dict[str, float]) -> None:
    """Prints the table of one concurrency."""
    print(f"\n{concurrency} streams   tokens/s  requests/s   first text ms     between texts ms   errors")
    for name, one in found.items():
        first, between = one["first_token_ms"], one["between_tokens_ms"]
        print(
            f"  {name:12}{one['tokens_per_second']:9.1f}{one['requests_per_second']:12.2f}"
            f"{first.get('p50', 0):9.1f} p50{between.get('p50', 0):15.2f} p50{one['errors']:9}\n"
            f"{'':35}{first.get('p95', 0):9.1f} p95{between.get('p95', 0):15.2f} p95"
        )
    print("  " + ", ".join(f"{name} {value}" for name, value in compared.items()), flush=True)


# --- the services -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def service(load: Load, dtype: str, scratch: Path, engine: str = "foundry") -> Iterator[str]:
    """Starts the service as a user does, with its own Ray. Yields its address."""
    settings = dict(model=load.package, dtype=dtype, device="cpu", threads=load.threads, engine=engine)
    settings |= dict(speculation="false")  # random models repeat themselves, and nobody else here would profit from it
    with serve_run("serve_app:build_app", scratch, **settings) as (url, _):
        yield url


@contextlib.contextmanager
def serve_run(app: str, scratch: Path, **settings: Any) -> Iterator[tuple[str, int]]:
    """Runs `serve run` with its own Ray and these settings. Yields the service's address and its process id."""
    port = free_port()
    settings |= dict(port=port, log_level="warning")
    folder = VLLM_BIN if settings.get("engine") == VLLM else Path(sys.executable).parent
    command = [str(folder / "serve"), "run", app]
    command += [f"{name}={value}" for name, value in settings.items()]
    environment = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "GPT_FOUNDRY_HOME": str(scratch)}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    with running(command, environment, port, scratch / f"service-{port}.txt") as started:
        yield started


@contextlib.contextmanager
def naive_service(load: Load, dtype: str, scratch: Path) -> Iterator[str]:
    """Starts `bench.peers.naive_service` with the same package. Yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "bench.peers.naive_service", load.package]
    command += ["--port", str(port), "--dtype", dtype, "--threads", str(load.threads)]
    with running(command, {"OMP_NUM_THREADS": str(load.threads)}, port, scratch / "naive.txt") as (url, _):
        yield url


@contextlib.contextmanager
def running(command: Sequence[str], environment: dict[str, str], port: int, output: Path) -> Iterator[tuple[str, int]]:
    """Starts a server, and yields its address and process id once it is ready.

    Raises SystemExit with its output if it never is.
    """
    heed_interrupts()  # or the server would not end
    with output.open("w+") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await_ready(url, process, file)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def await_ready(url: str, process: subprocess.Popen[bytes], output: IO[str]) -> None:
    """Waits until `url` answers at /ready."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            output.seek(0)
            what = "ended" if process.poll() is not None else f"was not ready after {START_SECONDS} s"
            raise SystemExit(f"{output.read()[-4000:]}\nthe server at {url} {what}")
        time.sleep(0.2)


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
