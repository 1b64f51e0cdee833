"""Measures how fast the engine decodes: `python -m bench.decode --preset gpt2-124m --batch 1 16 --peers`.

The model has the preset's shape and random weights; decoding is greedy and no token ends a text. It reports tokens per
second (while decoding, and from when the prompts arrive), the bandwidth achieved, and the share of the floor: the same
matrix products alone, measured in the same rounds. With `--peers`, transformers, CTranslate2, llama.cpp and vLLM, or
those that are named, do the same with the same weights, in turn with the engine, and in fp32 their text is compared
with the engine's. Run nothing else at the same time. It prints one JSON line last.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.command import print_report
from bench.floor import Floor, open_floor, step_bytes
from bench.peers import PEERS, QUANTISED, REFERENCES
from bench.peers.task import DecodeTask, DecodeTurn
from bench.turns import Contestant, Results, RunTurn, cores, median_ratio, run_in_turn
from bench.weights import GPT2_VOCAB_SIZE, random_package
from gptcore.config import ModelConfig
from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.engine.native import NativeRunner
from gptcore.package import describe, open_package
from gptcore.sampling import SamplingParams

ENGINE, FLOOR = "engine", "floor"
AGREE_BATCH, AGREE_TOKENS = 2, 24
"""Sequences and new tokens for the comparison of the contestants' texts."""


def main(argv: list[str] | None = None) -> int:
    """Prints a table per batch and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)
    return print_report(lambda scratch: measure(arguments, scratch))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m", help="shape of the model")
    parser.add_argument(
        "--vocab-size", type=int, default=GPT2_VOCAB_SIZE, help="of a preset; open models have their own"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences decoded together")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="the engine's precision")
    parser.add_argument(
        "--weights", default="", choices=["int8", "int4"], help="quantise the engine's weights, and the peers'"
    )
    names = list(dict.fromkeys(peer.name for peer in PEERS))
    parser.add_argument(
        "--peers", nargs="*", choices=names, metavar="NAME", help=f"measure other engines as well: {', '.join(names)}"
    )
    parser.add_argument("--prompt-floor", action="store_true", help="measure the floor of the prompts too")
    parser.add_argument("--no-agreement", action="store_true", help="do not compare the peers' texts in fp32")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5, help="rounds that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of every contestant")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backend", default="auto", help="the engine's backend: auto, native or torch")
    parser.add_argument(
        "--speculation", action="store_true", help="let the engine speculate; random models soon repeat themselves"
    )
    arguments = parser.parse_args(argv)
    if arguments.weights and arguments.dtype != "bfloat16":
        parser.error(f"--weights {arguments.weights} is measured with --dtype bfloat16, not {arguments.dtype}")
    for name in ("vocab_size", "batch", "prompt_tokens", "new_tokens", "turns", "threads"):
        value = getattr(arguments, name)
        least = {"vocab_size": 300, "new_tokens": 2}.get(name, 1)
        if min(value if isinstance(value, list) else [value]) < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    return arguments


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures everything, and returns the report."""
    package = random_package(scratch / "package", arguments.preset, arguments.vocab_size)
    task = DecodeTask(
        package=str(package.path),
        scratch=str(scratch),
        batch=1,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        vocab_size=package.config.vocab_size,
        device=arguments.device,
    )
    report = {
        "bench": "decode",
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "machine": machine(arguments.threads, arguments.device),
        "prompt_tokens": task.prompt_tokens,
        "new_tokens": task.new_tokens,
        "turns": arguments.turns,
    }
    print(describe(package).splitlines()[0])
    print(f"{report['machine']['cpu']}, {task.threads} threads, torch {torch.__version__}, {task.device}")
    if arguments.peers is not None and not arguments.no_agreement:
        report["agreement"] = agreement(replace(task, batch=AGREE_BATCH, new_tokens=AGREE_TOKENS), arguments)
    batches = {str(batch): measure_batch(replace(task, batch=batch), arguments) for batch in arguments.batch}
    return report | {"batches": batches}


def machine(threads: int, device: str) -> dict[str, Any]:
    """The machine's CPU, cores, versions, and load average before the measurement."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    gpu = {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {}
    load = {"load_before": round(os.getloadavg()[0], 2)}
    return {"cpu": model, "cores": cores(), "threads": threads, "torch": torch.__version__} | gpu | load


# --- the engine as a contestant --------------------------------------------------------------------------------


def engine(precision: str, arguments: argparse.Namespace) -> Contestant:
    open_it = functools.partial(open_engine, backend=arguments.backend, speculation=arguments.speculation)
    return Contestant(ENGINE, precision, open_it)


def open_engine(task: DecodeTask, precision: str, backend: str, speculation: bool) -> tuple[RunTurn, str]:
    """Opens the engine with a slot per sequence. All prompts run in the first step, so later steps only decode.

    With int8 or int4 weights, the rest is in bf16.
    """
    quantised = precision.startswith("int")
    package = open_package(Path(task.package), verify=False)
    settings = EngineSettings(
        slots=task.batch,
        prefill_tokens=task.batch * task.prompt_tokens,
        max_queue=task.batch,
        max_context=task.prompt_tokens + task.new_tokens,  # else two engines take half of the memory each
        dtype="bfloat16" if quantised else precision,
        weights=precision if quantised else "",
        device=task.device,
        backend=backend,
        threads=task.threads,
        prefix_cache=False,  # every turn has the same prompts, so a cache would skip them
        speculation=speculation,
    )
    runner = Engine(package, settings)
    runner.warm_up()
    clock = KernelClock(runner.runner) if isinstance(runner.runner, NativeRunner) else None
    params = SamplingParams(max_new_tokens=task.new_tokens, temperature=0, ignore_eos=True)

    def run_turn() -> DecodeTurn:
        tokens: dict[str, list[int]] = {}
        start = time.perf_counter()
        for number, prompt in enumerate(task.prompts()):
            runner.add(Request(str(number), tuple(prompt), params))
        first, begun, before = 0.0, 0, 0.0
        while runner.busy:
            for update in runner.step():
                tokens.setdefault(update.request_id, []).extend(update.token_ids)
            if not first and len(tokens) == task.batch:
                first, begun = time.perf_counter(), sum(map(len, tokens.values()))
                before = clock.seconds if clock else 0.0
        end = time.perf_counter()
        ordered = [tokens[str(number)] for number in range(task.batch)]
        kernel = clock.seconds - before if clock else None
        return DecodeTurn(first - start, end - first, ordered, sum(map(len, ordered)) - begun, kernel)

    return run_turn, f"{runner.info.runner}, slots {runner.info.slots}"


class KernelClock:
    """Counts the seconds that a runner spends in its native kernel; the rest of a step is Python."""

    def __init__(self, runner: NativeRunner) -> None:
        self.seconds, self._library = 0.0, runner._library
        self.gpt_forward, self.gpt_choose = map(self._timed, (self._library.gpt_forward, self._library.gpt_choose))
        runner._library = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - begun
            return result

        return call


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContestantResult:
    """One contestant's results at one batch size: medians over the turns."""

    label: str
    note: str
    decode_tokens_per_second: float
    whole_tokens_per_second: float
    prompt_tokens_per_second: float
    """Tokens of the prompts, all sequences together, until each has its first token."""
    step_ms: float
    gigabytes_per_second: float
    share_of_floor: float
    share_of_prompt_floor: float | None
    """Of the products of the prompts; None without `--prompt-floor`."""
    share_of_python: float | None
    """Of a decoding step, what is not in the engine's native kernel."""
    engine_ratio: float
    """The engine's decoding rate over this one's."""
    engine_whole_ratio: float
    """The same, from when the prompts arrive."""
    engine_prompt_ratio: float
    """The same, until every sequence has its first token."""
    engine_ratio_at_equal_precision: float | None
    """The same for the engine in this one's precision; None if the engine does not support it."""
    spread: tuple[float, float]
    """Slowest and fastest turn, decoding, in tokens/s."""


def measure_batch(task: DecodeTask, arguments: argparse.Namespace) -> dict[str, Any]:
    """One batch size: the floor, the engine and the peers in turn; the table is printed."""
    ours = engine(arguments.weights or arguments.dtype, arguments)
    floor = Contestant(FLOOR, arguments.dtype, functools.partial(open_floor, prompts=arguments.prompt_floor))
    contestants = [floor, ours]
    if arguments.peers is not None:
        others: tuple[str, ...] = ("int8", "int4", arguments.dtype) if arguments.weights else ("bfloat16", "float32")
        contestants += chosen(QUANTISED if arguments.weights else PEERS, arguments)
        contestants += [engine(other, arguments) for other in others if other != ours.precision]
    results = run_in_turn(contestants, task, arguments.turns)
    for label in (floor.label, ours.label):
        if label in results.absent:
            raise SystemExit(f"{label}: {results.absent[label]}")
    config = open_package(Path(task.package), verify=False).config
    rows = [row_of(c, results, config, task, floor, ours) for c in contestants[1:] if c.label in results.turns]
    floors: list[Floor] = results.turns[floor.label]
    step = statistics.median(f.step_seconds for f in floors)
    read = statistics.median(f.bandwidth for f in floors)
    print_table(task, rows, results, step, read)
    return {
        "floor": {
            "note": results.notes[floor.label],
            "matmul_step_ms": round(step * 1e3, 3),
            "matmul_tokens_per_second": round(task.batch / step, 1),
            "read_gigabytes_per_second": round(read / 1e9, 2),
        },
        "contestants": {row.label: {k: v for k, v in row.__dict__.items() if k != "label"} for row in rows},
        "absent": results.absent,
    }


def row_of(
    contestant: Contestant, results: Results, config: ModelConfig, task: DecodeTask, floor: Contestant, ours: Contestant
) -> ContestantResult:
    """The medians of one contestant. Ratios and the share of the floor are computed round by round."""
    turns: list[DecodeTurn] = results.turns[contestant.label]
    rates = [turn.decode_rate for turn in turns]
    steps, prompts = [task.batch / rate for rate in rates], [turn.prompt_seconds for turn in turns]  # seconds
    floors = [f.step_seconds for f in results.turns[floor.label]]
    ahead = [f.prompt_seconds for f in results.turns[floor.label] if f.prompt_seconds]
    python = [1 - turn.kernel_seconds / turn.decode_seconds for turn in turns if turn.kernel_seconds is not None]
    read = step_bytes(config, task.batch, task.prompt_tokens + task.new_tokens / 2, contestant.precision)
    best: list[DecodeTurn] = results.turns[ours.label]
    equal: list[DecodeTurn] = results.turns.get(f"{ENGINE} {contestant.precision}", [])
    return ContestantResult(
        label=contestant.label,
        note=results.notes[contestant.label],
        decode_tokens_per_second=round(statistics.median(rates), 1),
        whole_tokens_per_second=round(statistics.median(turn.whole_rate for turn in turns), 1),
        prompt_tokens_per_second=round(statistics.median(task.batch * task.prompt_tokens / s for s in prompts), 1),
        step_ms=round(statistics.median(steps) * 1e3, 3),
        gigabytes_per_second=round(statistics.median(read / s for s in steps) / 1e9, 2),
        share_of_floor=round(median_ratio(floors, steps), 3),
        share_of_prompt_floor=round(median_ratio(ahead, prompts), 3) if ahead else None,
        share_of_python=round(statistics.median(python), 3) if python else None,
        engine_ratio=round(median_ratio([t.decode_rate for t in best], rates), 3),
        engine_whole_ratio=round(median_ratio([t.whole_rate for t in best], [t.whole_rate for t in turns]), 3),
        engine_prompt_ratio=round(median_ratio(prompts, [t.prompt_seconds for t in best]), 3),
        engine_ratio_at_equal_precision=(
            round(median_ratio([t.decode_rate for t in equal], rates), 3) if equal else None
        ),
        spread=(round(min(rates), 1), round(max(rates), 1)),
    )


def print_table(task: DecodeTask, rows: list[ContestantResult], results: Results, step: float, read: float) -> None:
    """Prints the results. `step` (seconds) and `read` (bytes per second) are the floor."""
    print(f"\nbatch {task.batch}, prompt {task.prompt_tokens}, {task.new_tokens} new tokens, median of the turns")
    print(f"{'':24}{'decode':>10}{'whole':>10}{'step':>10}{'read':>8}{'floor':>7}{'engine is':>11}")
    print(f"{'':24}{'tok/s':>10}{'tok/s':>10}{'ms':>10}{'GB/s':>8}{'share':>7}{'so fast':>11}")
    for row in rows:
        print(
            f"{row.label:24}{row.decode_tokens_per_second:10.1f}{row.whole_tokens_per_second:10.1f}{row.step_ms:10.2f}"
            f"{row.gigabytes_per_second:8.1f}{row.share_of_floor:7.0%}{row.engine_ratio:10.2f}x"
        )
    print(f"{'floor':24}{task.batch / step:10.1f}{'':10}{step * 1e3:10.2f}{read / 1e9:8.1f}", flush=True)
    for label, reason in results.absent.items():
        print(f"{label:24}{reason}")


def chosen(peers: list[Contestant], arguments: argparse.Namespace) -> list[Contestant]:
    """The peers that were named; all of them after a bare `--peers`."""
    return [peer for peer in peers if not arguments.peers or peer.name in arguments.peers]


def agreement(task: DecodeTask, arguments: argparse.Namespace) -> dict[str, Any]:
    """For each sequence, how many of the first greedy tokens each peer shares with the engine, both in fp32."""
    ours = engine("float32", arguments)
    results = run_in_turn([ours, *chosen(REFERENCES, arguments)], task, turns=1)
    if ours.label in results.absent:
        raise SystemExit(f"{ours.label}: {results.absent[ours.label]}")
    expected = results.turns[ours.label][0].tokens
    found: dict[str, Any] = {"of": task.new_tokens}
    for label, turns in results.turns.items():
        if label != ours.label:
            pairs = zip(expected, turns[0].tokens, strict=True)
            found[label] = [common_prefix(left, right) for left, right in pairs]
    print(f"tokens of {task.new_tokens} that are the same as the engine's, greedy, in fp32: ", end="")
    print(", ".join(f"{label} {counts}" for label, counts in found.items() if label != "of"))
    return found


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many of the first tokens are the same in both."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


if __name__ == "__main__":
    sys.exit(main())
