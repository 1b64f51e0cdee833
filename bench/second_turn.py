"""Measures how soon a conversation's second turn starts: `python -m bench.second_turn --preset gpt2-124m`.

The service is started with `serve run` and its own Ray. A first turn of `--first-tokens` is answered. Then a second
turn, the same tokens with `--more-tokens` behind them, takes turns with other prompts: one of as many new tokens alone,
and one as long as both together, which nothing is known of. It reports the time to the first text of each, medians, and
prints one JSON line last. Tokens are random, and no two conversations begin alike.
"""

import argparse
import json
import random
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.command import print_report
from bench.decode import machine
from bench.load import Load
from bench.serve import service
from bench.turns import cores, median_ratio
from bench.weights import random_package

ANSWER_TOKENS = 8
NAMES = {"second": "the second turn", "alone": "its new tokens alone", "whole": "both turns, unknown"}


def main(argv: list[str] | None = None) -> int:
    """Prints a table and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)
    return print_report(lambda scratch: measure(arguments, scratch))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.second_turn", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m", help="shape of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--first-tokens", type=int, default=512, help="of the first turn")
    parser.add_argument("--more-tokens", type=int, default=64, help="new ones in the second turn")
    parser.add_argument("--turns", type=int, default=9, help="conversations that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=cores(), help="of the service")
    arguments = parser.parse_args(argv)
    for name in ("first_tokens", "more_tokens", "turns", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected at least 1")
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures everything, and returns the report. Raises RuntimeError if a request is refused."""
    package = random_package(scratch / "package", arguments.preset)
    about = machine(arguments.threads, "cpu")
    load = Load(str(package.path), 1, 1, arguments.first_tokens, ANSWER_TOKENS, arguments.threads)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with service(load, arguments.dtype, scratch) as url:
        with urllib.request.urlopen(f"{url}/v1/models") as listed:
            [model] = (one["id"] for one in json.load(listed)["data"])
        for number in range(arguments.turns + 1):
            ids = Ids(number, package.config.vocab_size)
            first, more = ids(arguments.first_tokens), ids(arguments.more_tokens)
            first_text_seconds(url, model, first)
            prompts = {
                "second": first + more,
                "alone": ids(len(more)),
                "whole": ids(len(first) + len(more)),
            }
            for name, prompt in prompts.items():
                took = first_text_seconds(url, model, prompt)
                if number:
                    seconds[name].append(took)
    found = {name: round(1000 * statistics.median(times), 2) for name, times in seconds.items()}
    for name, what in NAMES.items():
        print(f"{what:22}{found[name]:10.1f} ms to the first text", flush=True)
    return {
        "bench": "second_turn",
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "machine": about,
        "first_tokens": arguments.first_tokens,
        "more_tokens": arguments.more_tokens,
        "turns": arguments.turns,
        "first_text_ms": found,
        "of_new_tokens_alone": round(median_ratio(seconds["second"], seconds["alone"]), 3),
        "of_whole": round(median_ratio(seconds["second"], seconds["whole"]), 3),
    }


class Ids:
    """Random token ids, the same for the same number of a conversation."""

    def __init__(self, number: int, vocab_size: int) -> None:
        self._chooser, self._most = random.Random(number), vocab_size - 2  # the last one ends a text

    def __call__(self, count: int) -> list[int]:
        return [self._chooser.randint(0, self._most) for _ in range(count)]


def first_text_seconds(url: str, model: str, prompt: list[int]) -> float:
    """The time from a request for a few tokens until the first of their text arrives."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    begun, took = time.perf_counter(), 0.0
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if not took and line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                took = time.perf_counter() - begun
    if not took:
        raise RuntimeError(f"{url} sent no text for a prompt of {len(prompt)} tokens")
    return took


if __name__ == "__main__":
    sys.exit(main())
