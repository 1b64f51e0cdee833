"""Measures how a job gets its tokens: `python -m bench.data --gigabytes 2`.

The text is generated: lines of the built-in text in random order. First, a job's tokenising (`train_job.data`, from the
file to the shards) and tiktoken's `encode_ordinary_batch` of the same text in memory take turns, one thread each, with
GPT-2's vocabulary. Then a text of `--gigabytes` and one of an eighth of that are prepared as by a job, each in its own
process, and the peaks of memory are compared. At last, another process prepares the long text again and finds its
tokens. It prints one JSON line last.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tiktoken

from bench.command import print_report
from bench.decode import machine
from bench.turns import Contestant, RunTurn, median_ratio, run_in_turn
from gptcore.errors import ConfigError
from gptcore.tokenizer import load_tokenizer
from train_job.config import build_config
from train_job.data.corpus import open_corpus
from train_job.data.inputs import prepare_inputs
from train_job.data.pieces import builtin_documents
from train_job.data.shards import blocks, prepare
from train_job.training.hardware import peak_memory_mb

OURS, TIKTOKEN, VOCABULARY = "ours", "tiktoken", "gpt2"
PART = 8
"""The long text over the short one."""
DISK = 2.0
"""Bytes on disk per byte of the long text: both texts, their tokens and some room."""


@dataclass(frozen=True)
class DataTask:
    """A text file, and a folder for shards."""

    text: str
    scratch: str
    threads: int = 1


@dataclass(frozen=True)
class DataTurn:
    """The result of one turn."""

    rate: float
    """Bytes of text per second."""
    tokens: int
    """Without those that a document begins and ends with."""


@dataclass(frozen=True)
class Prepared:
    """What a process took to have its tokens: seconds after the imports, and MiB at most."""

    seconds: float
    peak: float


def main(argv: list[str] | None = None) -> int:
    """Prints the figures and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)
    return print_report(lambda scratch: measure(arguments, scratch))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=16.0, help="text of a turn beside tiktoken")
    parser.add_argument("--turns", type=int, default=5, help="rounds that count, after one for warm-up")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="text whose memory is measured")
    arguments = parser.parse_args(argv)
    for name in ("megabytes", "gigabytes"):
        if not 0.001 <= getattr(arguments, name) <= 1000:
            parser.error(f"--{name} is {getattr(arguments, name):g}; expected 0.001 to 1000")
    if arguments.turns < 1:
        parser.error(f"--turns is {arguments.turns}; expected at least 1")
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures everything, prints it, and returns the report. Raises ConfigError if the disk is too small."""
    long, free = round(arguments.gigabytes * 1e9), shutil.disk_usage(scratch).free
    if long * DISK > free:
        raise ConfigError(
            f"--gigabytes is {arguments.gigabytes:g}, which takes {long * DISK / 1e9:.1f} GB in {scratch}, where "
            f"{free / 1e9:.1f} GB are free; expected at most {free / DISK / 1e9:.1f}, or TMPDIR on another disk"
        )
    report = {"bench": "data", "machine": machine(1, "cpu"), "megabytes": arguments.megabytes}
    text = generate(scratch / "turn.txt", round(arguments.megabytes * 1e6))
    report |= compare(DataTask(str(text), str(scratch)), arguments.turns)
    short = apart(generate(scratch / "short.txt", long // PART), scratch / "short")
    text = generate(scratch / "long.txt", long)
    first, again = apart(text, scratch / "long"), apart(text, scratch / "long")
    print(f"{long / 1e9:g} GB: {first.peak:,.0f} MiB at most, an eighth of it {short.peak:,.0f} MiB")
    print(f"the tokens are there after {first.seconds:.1f} s, in a second run after {again.seconds:.2f} s", flush=True)
    return report | {
        "gigabytes": arguments.gigabytes,
        "peak_mib": round(first.peak),
        "peak_mib_of_an_eighth": round(short.peak),
        "growth": round(first.peak / short.peak, 3),
        "first_run_seconds": round(first.seconds, 2),
        "second_run_seconds": round(again.seconds, 3),
    }


def generate(path: Path, size: int) -> Path:
    """Writes about `size` bytes: lines of the built-in text in an order drawn with the seed 0."""
    chooser, lines = random.Random(0), "".join(builtin_documents()).splitlines()
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.write("\n".join(chooser.choices(lines, k=min(10_000, size // 50 + 1))) + "\n")
    return path


# --- beside tiktoken --------------------------------------------------------------------------------------------


def compare(task: DataTask, turns: int) -> dict[str, Any]:
    """Both in turn; the ratio is ours over tiktoken's."""
    contestants = [Contestant(OURS, VOCABULARY, open_ours), Contestant(TIKTOKEN, VOCABULARY, open_tiktoken)]
    results = run_in_turn(contestants, task, turns)
    ours, theirs = (results.turns[contestant.label] for contestant in contestants)
    if ours[0].tokens != theirs[0].tokens:
        raise SystemExit(f"the tokens differ: {ours[0].tokens} of ours, {theirs[0].tokens} of tiktoken's")
    rates = {name: [turn.rate / 1e6 for turn in of] for name, of in ((OURS, ours), (TIKTOKEN, theirs))}
    ratio = round(median_ratio(rates[OURS], rates[TIKTOKEN]), 3)
    found = {
        name: {
            "megabytes_per_second": round(statistics.median(of), 3),
            "spread": (round(min(of), 3), round(max(of), 3)),
        }
        for name, of in rates.items()
    }
    for name, figures in found.items():
        print(f"{name:10}{figures['megabytes_per_second']:8.2f} MB/s with one thread")
    print(f"ratio     {ratio:8.3f}", flush=True)
    return {"contestants": found, "ratio": ratio, "turns": turns}


def open_ours(task: DataTask, _: str) -> tuple[RunTurn, str]:
    """A job's way from the file to the shards, into an empty cache each time."""
    tokenizer = load_tokenizer(VOCABULARY)

    def run_turn() -> DataTurn:
        with tempfile.TemporaryDirectory(dir=task.scratch) as cache:
            start = time.perf_counter()
            tokens = prepare(open_corpus(task.text, cache_dir=Path(cache)), tokenizer, Path(cache))
            seconds = time.perf_counter() - start
        return DataTurn(tokens.num_bytes / seconds, tokens.num_tokens - tokens.num_documents - 1)

    return run_turn, "from the file to the shards"


def open_tiktoken(task: DataTask, _: str) -> tuple[RunTurn, str]:
    """`encode_ordinary_batch` alone, of the blocks that a job tokenises one by one."""
    load_tokenizer(VOCABULARY)  # with its time limit, and an error that says what to do offline
    encoding, text = tiktoken.get_encoding(VOCABULARY), Path(task.text).read_text(encoding="utf-8")
    size, parts = len(text.encode()), list(blocks(text))

    def run_turn() -> DataTurn:
        start = time.perf_counter()
        found = encoding.encode_ordinary_batch(parts, num_threads=task.threads)
        return DataTurn(size / (time.perf_counter() - start), sum(map(len, found)))

    return run_turn, f"tiktoken {tiktoken.__version__}, encode_ordinary_batch"


# --- memory, and a second run -----------------------------------------------------------------------------------


def apart(text: Path, cache: Path) -> Prepared:
    """Prepares a job's inputs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(prepared, str(text), str(cache)).result()


def prepared(text: str, cache: str) -> Prepared:
    """Prepares a job's inputs, all in this process."""
    start = time.perf_counter()
    prepare_inputs(build_config({"data": text, "tokenizer": VOCABULARY, "cache_dir": cache}))
    return Prepared(time.perf_counter() - start, peak_memory_mb()["memory"])


if __name__ == "__main__":
    sys.exit(main())
