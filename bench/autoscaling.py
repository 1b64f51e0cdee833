"""Measures autoscaling under a recorded day of load: `python -m bench.autoscaling`.

Starts the service with two to four replicas and sends it a day's requests (`bench/day.csv`), compressed to minutes.
Arrivals are a Poisson process and do not wait for answers. It reports load, replicas and latency by the hour, failed
requests, and what the replicas cost per 1,000 tokens. Each step of a replica's engine takes `--step-ms`, as on a device
of its own (`bench/paced.py`). `--steady` measures one replica at constant loads instead: how latency grows with the
share of its slots that are in use. It prints one JSON line last.
"""

import argparse
import asyncio
import csv
import itertools
import json
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.decode import machine
from bench.load import Load, Reply, first_token_seconds, open_client, percentiles
from bench.serve import serve_run
from bench.turns import cores
from bench.weights import random_package
from gptcore.engine.settings import UTILISATION, target_ongoing_requests
from gptcore.errors import ConfigError, FoundryError
from train_job.training.devices import find_device

DAY = Path(__file__).with_name("day.csv")
PRESET, VOCABULARY = "tiny", 12_000
REPLICA = "ray::ServeReplica"
"""The title of a replica's process begins like this."""
START_SECONDS = 120
MOST_ERRORS = 30
"""Errors in the report, at most."""
POSITIVE = ("minutes", "peak", "price", "step_ms", "slots", "max_replicas", "new_tokens", "prompt_tokens", "seconds")


def main(argv: list[str] | None = None) -> int:
    """Prints tables and the JSON line. Returns 1 if a request failed, 2 for bad input."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the service is stopped
    try:
        arguments = parse(argv)
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
            report = measure_levels(arguments, Path(scratch)) if arguments.steady else measure(arguments, Path(scratch))
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 1 if report["failed"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises ConfigError for a value out of range."""
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12, help="length of the day")
    parser.add_argument("--peak", type=float, help="requests/s in the busiest hour; default: what all replicas carry")
    parser.add_argument("--min-replicas", type=int, default=2)
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8, help="sequences that a replica decodes together")
    parser.add_argument("--step-ms", type=float, default=25, help="time of a decoding step, as on a device of its own")
    parser.add_argument("--target", type=float, help="target_ongoing_requests; default: the service's, by the slots")
    parser.add_argument("--upscale-delay-s", type=float, default=2, help="the service's setting")
    parser.add_argument("--downscale-delay-s", type=float, default=15, help="the service's setting")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64, help="mean length of an answer")
    parser.add_argument("--gpu", default="h100", help="whose price of an hour a replica costs")
    parser.add_argument("--price", type=float, help="dollars per replica-hour; default: that of --gpu")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--steady", type=float, nargs="+", help="measure one replica at these shares of its slots")
    parser.add_argument("--seconds", type=float, default=60, help="length of each --steady load")
    arguments = parser.parse_args(argv)
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected more than 0, and finite")
    for share in arguments.steady or ():
        if not 0 < share < math.inf:
            raise ConfigError(f"--steady is {share}; expected shares of more than 0, such as 0.7")
    if not 1 <= arguments.min_replicas <= arguments.max_replicas:
        raise ConfigError(f"--min-replicas is {arguments.min_replicas}; expected 1 to {arguments.max_replicas}")
    arguments.price = arguments.price or find_device(arguments.gpu).price
    if arguments.price is None:
        raise ConfigError(f"the price of --gpu {arguments.gpu} is not known; give --price")
    return arguments


# --- the load ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hour:
    """One hour of the day: its name, and its requests per second when the day is played."""

    name: str
    rate: float


def day(peak: float) -> list[Hour]:
    """The recorded day from its quietest hour on, with `peak` requests per second in the busiest."""
    lines = [line for line in DAY.read_text().splitlines() if not line.startswith("#")]
    counts = {int(row["hour"]): int(row["requests"]) for row in csv.DictReader(lines)}
    start, most = min(counts, key=counts.__getitem__), max(counts.values())
    hours = [(start + i) % len(counts) for i in range(len(counts))]
    return [Hour(f"{hour:02}:00", peak * counts[hour] / most) for hour in hours]


def rate_at(rates: Sequence[float], hour: float) -> float:
    """The rate at a time in hours: straight lines from the middle of one hour to that of the next, round the clock."""
    before, share = divmod(hour - 0.5, 1)
    first, second = (rates[int(before + i) % len(rates)] for i in (0, 1))
    return first + share * (second - first)


def arrivals(rates: Sequence[float], seconds: float, seed: int) -> list[float]:
    """The times, in seconds, of a Poisson process with these hourly rates. An hour takes `seconds`.

    Candidates arrive at the highest rate, and each is kept with the rate at its time over the highest as probability.
    The same seed gives the same times.
    """
    chooser, most = random.Random(seed), max(rates)
    times: list[float] = []
    now = chooser.expovariate(most)
    while now < seconds * len(rates):
        if chooser.random() * most < rate_at(rates, now / seconds):
            times.append(now)
        now += chooser.expovariate(most)
    return times


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    at: float
    """Seconds since the start."""
    ongoing: int
    """Requests sent and not yet answered whole."""
    replicas: int
    """Processes of replicas, including those that start or finish their last requests."""


@dataclass(frozen=True)
class Played:
    """What happened under a load. Replies are in the order of arrival; their times are seconds since the start."""

    times: Sequence[float]
    replies: Sequence[Reply]
    samples: Sequence[Sample]

    @property
    def failed(self) -> list[str]:
        """When each failed request was sent, and its error."""
        return [f"after {reply.sent:.1f} s: {reply.error}" for reply in self.replies if reply.error]

    @property
    def tokens(self) -> int:
        return sum(reply.tokens for reply in self.replies)


async def play(times: Sequence[float], load: Load, url: str, process: psutil.Process) -> Played:
    """Sends a request at each of `times`, whether or not earlier ones are answered, and waits for all answers."""
    begun, open_requests = time.perf_counter(), 0
    samples: list[Sample] = []

    async def request(number: int) -> Reply:
        nonlocal open_requests
        open_requests += 1
        reply = await ask(*load.ask(0, 0, number))
        open_requests -= 1
        return Reply(reply.sent - begun, [at - begun for at in reply.arrivals], reply.tokens, reply.error)

    async def watch() -> None:
        while True:
            replicas = await asyncio.to_thread(count_replicas, process)
            samples.append(Sample(time.perf_counter() - begun, open_requests, replicas))
            await asyncio.sleep(1)

    async with open_client(f"{url}/generate") as ask:
        watching = asyncio.create_task(watch())
        sent = []
        for number, at in enumerate(times):
            await asyncio.sleep(begun + at - time.perf_counter())
            sent.append(asyncio.create_task(request(number)))
        replies = await asyncio.gather(*sent)
        watching.cancel()
    samples.append(Sample(time.perf_counter() - begun, open_requests, samples[-1].replicas))
    return Played(times, replies, samples)


def count_replicas(service: psutil.Process) -> int:
    """Processes of replicas among those that the service has started."""
    found = 0
    for process in service.children(recursive=True):
        try:
            found += any(word.startswith(REPLICA) for word in process.cmdline()[:1])
        except psutil.Error:
            continue  # it has ended
    return found


# --- the measurements -------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Plays the day, prints its hours, and returns the report."""
    each = UTILISATION * most_requests(arguments)
    hours = day(arguments.peak or each * arguments.max_replicas)
    seconds = arguments.minutes * 60 / len(hours)
    times = arrivals([hour.rate for hour in hours], seconds, arguments.seed)
    target = arguments.target or target_ongoing_requests(arguments.slots)
    print(
        f"a day in {arguments.minutes:g} minutes: {len(times):,} requests, at most {max(h.rate for h in hours):.1f}/s; "
        f"{arguments.min_replicas} to {arguments.max_replicas} replicas of {arguments.slots} slots, "
        f"target_ongoing_requests {target:g}, {arguments.step_ms:g} ms per step",
        flush=True,
    )
    played = run(arguments, scratch, times, arguments.min_replicas, arguments.max_replicas)
    rows = [hour_row(arguments, hours, i, seconds, each, played) for i in range(len(hours))]
    print_hours(rows)
    report = summary(arguments, played) | {"target_ongoing_requests": target, "hours": rows}
    print_summary(report)
    return report


def most_requests(arguments: argparse.Namespace) -> float:
    """Requests per second that a replica completes with all slots in use."""
    # A request waits half a step until the next one begins. The step that runs the prompt gives the first token.
    return float(arguments.slots / (arguments.step_ms / 1e3 * (arguments.new_tokens + 0.5)))


def run(arguments: argparse.Namespace, scratch: Path, times: Sequence[float], fewest: int, most: int) -> Played:
    """Starts the service with `fewest` to `most` replicas, and plays the load."""
    package = random_package(scratch / "package", PRESET, VOCABULARY)
    load = Load(str(package.path), 1, 1, arguments.prompt_tokens, arguments.new_tokens, threads=1)
    settings: dict[str, Any] = dict(model=load.package, device="cpu", threads=1, slots=arguments.slots)
    settings |= dict(speculation="false")  # a step is a token, as `capacity` assumes
    settings |= dict(min_replicas=fewest, max_replicas=most, step_ms=arguments.step_ms)
    settings |= dict(upscale_delay_s=arguments.upscale_delay_s, downscale_delay_s=arguments.downscale_delay_s)
    settings |= dict(target_ongoing_requests=arguments.target or 0)
    with serve_run("bench.paced:build_app", scratch, **settings) as (url, pid):
        process, deadline = psutil.Process(pid), time.monotonic() + START_SECONDS
        while count_replicas(process) < fewest:
            if time.monotonic() > deadline:
                raise SystemExit(f"after {START_SECONDS} s there are fewer than {fewest} replicas")
            time.sleep(0.5)
        return asyncio.run(play(times, load, url, process))


def hour_row(
    arguments: argparse.Namespace, hours: Sequence[Hour], i: int, seconds: float, each: float, played: Played
) -> dict[str, Any]:
    """What happened in hour `i`. `each` is the load in requests per second that the plan gives one replica."""
    inside = [s for s in played.samples if i * seconds <= s.at < (i + 1) * seconds]
    inside = inside or [min(played.samples, key=lambda s: abs(s.at - (i + 0.5) * seconds))]  # a busy machine sees fewer
    replies = [r for t, r in zip(played.times, played.replies, strict=True) if i * seconds <= t < (i + 1) * seconds]
    replicas = [sample.replicas for sample in inside]
    planned = math.ceil(hours[i].rate / each - 1e-9)
    return {
        "hour": hours[i].name,
        "requests_per_second": round(len(replies) / seconds, 2),
        "ongoing": round(statistics.mean(sample.ongoing for sample in inside), 1),
        "planned_replicas": min(max(planned, arguments.min_replicas), arguments.max_replicas),
        "replicas": round(statistics.mean(replicas), 1),
        "fewest_replicas": min(replicas),
        "most_replicas": max(replicas),
        "first_token_ms": percentiles(first_token_seconds(replies)),
    }


def summary(arguments: argparse.Namespace, played: Played) -> dict[str, Any]:
    """The figures of the whole day."""
    used = replica_seconds(played.samples)
    always = arguments.max_replicas * played.samples[-1].at
    counts = [sample.replicas for sample in played.samples]
    return {
        "bench": "autoscaling",
        "machine": machine(cores(), "cpu"),
        "minutes": arguments.minutes,
        "slots": arguments.slots,
        "step_ms": arguments.step_ms,
        "requests": len(played.replies),
        "failed": len(played.failed),
        **({"errors": played.failed[:MOST_ERRORS]} if played.failed else {}),
        "tokens": played.tokens,
        **latencies(played),
        "replica_changes": sum(a != b for a, b in itertools.pairwise(counts)),
        "replica_seconds": round(used),
        "saved": round(1 - used / always, 3),
        "price": arguments.price,
        "dollars_per_1000_tokens": cost(used, arguments.price, played.tokens),
        "dollars_per_1000_tokens_at_most_replicas": cost(always, arguments.price, played.tokens),
    }


def latencies(played: Played) -> dict[str, Any]:
    """Times to the first token and to the last, and how late requests were sent."""
    sent = zip(played.times, played.replies, strict=True)
    return {
        "first_token_ms": percentiles(first_token_seconds(played.replies)),
        "whole_ms": percentiles([r.arrivals[-1] - r.sent for r in played.replies if r.arrivals]),
        "sent_late_ms": percentiles([reply.sent - at for at, reply in sent]),
    }


def replica_seconds(samples: Sequence[Sample]) -> float:
    """Seconds of all replicas together; each count holds until the next sample."""
    return sum(before.replicas * (after.at - before.at) for before, after in itertools.pairwise(samples))


def cost(seconds: float, price: float, tokens: int) -> float | None:
    """Dollars per 1,000 new tokens, for this many replica-seconds at `price` per replica-hour; None without tokens."""
    return round(seconds / 3600 * price / tokens * 1000, 6) if tokens else None


def measure_levels(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures one replica at each of the constant loads, and returns the report."""
    print(
        f"one replica of {arguments.slots} slots, {arguments.step_ms:g} ms per step, {arguments.seconds:g} s per load"
    )
    print("share of slots  requests  ongoing   first token ms: p50     p95     p99   whole ms: p50     p95", flush=True)
    levels = []
    for number, share in enumerate(arguments.steady):
        folder = scratch / str(number)
        folder.mkdir()
        times = arrivals([share * most_requests(arguments)], arguments.seconds, arguments.seed)
        played = run(arguments, folder, times, 1, 1)
        ongoing = statistics.mean(sample.ongoing for sample in played.samples)
        level = {"share": share, "requests": len(times), "ongoing": round(ongoing, 1)}
        level |= {"failed": len(played.failed), **latencies(played)}
        levels.append(level)
        first, whole = level["first_token_ms"], level["whole_ms"]
        print(
            f"{share:14.0%}{len(times):10}{ongoing:9.1f}{first['p50']:22.0f}{first['p95']:8.0f}{first['p99']:8.0f}"
            f"{whole['p50']:16.0f}{whole['p95']:8.0f}",
            flush=True,
        )
    failed = sum(int(level["failed"]) for level in levels)
    settings = {"slots": arguments.slots, "step_ms": arguments.step_ms, "machine": machine(cores(), "cpu")}
    return {"bench": "autoscaling", "steady": levels, "failed": failed, **settings}


# --- printing ---------------------------------------------------------------------------------------------------


def print_hours(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table over time."""
    print("\nhour   requests/s  ongoing  planned  replicas (fewest to most)  first token ms: p50     p95")
    for row in rows:
        between = f"({row['fewest_replicas']} to {row['most_replicas']})"
        first = row["first_token_ms"]
        print(
            f"{row['hour']:7}{row['requests_per_second']:10.1f}{row['ongoing']:9.1f}{row['planned_replicas']:9}"
            f"{row['replicas']:10.1f} {between:17}{first.get('p50', 0):21.0f}{first.get('p95', 0):8.0f}"
        )


def print_summary(report: dict[str, Any]) -> None:
    """Prints the figures of the whole day."""
    print(f"\n{report['requests']:,} requests, {report['failed']} failed; {report['tokens']:,} tokens")
    for name, what in (("first_token_ms", "first token"), ("whole_ms", "whole text")):
        values = ", ".join(f"{key} {value:,.0f}" for key, value in report[name].items())
        print(f"{what} after (ms): {values}")
    print(f"{report['replica_seconds']:,} replica-seconds, {report['saved']:.0%} less than all replicas all the time")
    print(
        f"{report['dollars_per_1000_tokens']} dollars per 1,000 tokens at {report['price']:g} a replica-hour; "
        f"{report['dollars_per_1000_tokens_at_most_replicas']} with all replicas all the time"
    )


if __name__ == "__main__":
    sys.exit(main())
