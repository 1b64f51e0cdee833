"""Measures what speculation gains and costs: `python -m bench.speculation --preset quick --batch 1 16`.

Two engines, one of which speculates, decode the same texts in turn. A `loop` repeats itself all the time. An `edit` is
a copy of the prompt in which about one token in 25 is changed, added or left out. A text `without` repetition is drawn
at temperature 1. The weights are random, in a preset's shape, so the tokens of the first two come from a script instead
of the model's choices; the whole network runs all the same. It prints one JSON line last.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.command import print_report
from bench.decode import machine
from bench.turns import cores, median_ratio
from bench.weights import GPT2_VOCAB_SIZE, random_package
from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.package import Package, describe
from gptcore.sampling import SamplingParams, SamplingState

LOOP, EDIT, WITHOUT = "loop", "edit", "without"
PERIOD, EVERY = 40, 25
"""Tokens of a loop's period, and of an edit for each change."""


@dataclass(frozen=True)
class Turn:
    """Decoding begins once every sequence has its first token."""

    rate: float
    """Tokens per second while decoding, all sequences together."""
    tokens: dict[str, list[int]]
    steps: int
    drafted: int
    accepted: int


def main(argv: list[str] | None = None) -> int:
    """Prints a table and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)

    def measured(scratch: Path) -> dict[str, Any]:
        return measure(random_package(scratch / "package", arguments.preset, arguments.vocab_size), arguments)

    return print_report(measured)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quick", help="shape of the model")
    parser.add_argument("--vocab-size", type=int, default=GPT2_VOCAB_SIZE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences decoded together")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="the engine's precision")
    parser.add_argument("--new-tokens", type=int, default=120, help="tokens of each text; an edit's prompt has as many")
    parser.add_argument("--turns", type=int, default=7, help="rounds that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads")
    arguments = parser.parse_args(argv)
    for name in ("batch", "turns", "threads"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} is {value}; expected at least 1")
    if arguments.new_tokens <= PERIOD:
        parser.error(f"--new-tokens is {arguments.new_tokens}; expected more than {PERIOD}, the period of a loop")
    if arguments.vocab_size < 300:
        parser.error(f"--vocab-size is {arguments.vocab_size}; expected at least 300")
    return arguments


def measure(package: Package, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all texts at all batch sizes, prints the table, and returns the report."""
    print(describe(package).splitlines()[0])
    print(f"{'':16}{'without':>10}{'with':>10}{'ratio':>8}{'slowest':>9}{'fastest':>9}{'steps':>8}{'accepted':>10}")
    print(f"{'':16}{'tok/s':>10}{'tok/s':>10}")
    rows = {}
    for batch in arguments.batch:
        engines = [open_engine(package, arguments, batch, speculation) for speculation in (False, True)]
        for text in (LOOP, EDIT, WITHOUT):
            rows[f"{text}, {batch}"] = row = compare(
                engines, scripts(text, batch, package.tokenizer.vocab_size, arguments), arguments
            )
            print(
                f"{text + ', ' + str(batch):16}{row['without']:10.1f}{row['with']:10.1f}{row['ratio']:8.3f}"
                f"{row['spread'][0]:9.3f}{row['spread'][1]:9.3f}{row['steps']:8.0%}{row['accepted']:10.0%}",
                flush=True,
            )
        for engine in engines:
            engine.close()
    named = {"preset": arguments.preset, "dtype": arguments.dtype, "new_tokens": arguments.new_tokens}
    return {"bench": "speculation", **named, "machine": machine(arguments.threads, "cpu"), "texts": rows}


def open_engine(package: Package, arguments: argparse.Namespace, batch: int, speculation: bool) -> Engine:
    """An engine on the native kernel with a slot for each sequence. Raises ConfigError."""
    settings = EngineSettings(
        slots=batch,
        max_context=2 * arguments.new_tokens + PERIOD,
        prefill_tokens=batch * arguments.new_tokens,  # all prompts in the first step, so later ones only decode
        dtype=arguments.dtype,
        device="cpu",
        backend="native",
        threads=arguments.threads,
        prefix_cache=False,
        speculation=speculation,
    )
    engine = Engine(package, settings)
    engine.warm_up()
    return engine


def scripts(
    text: str, batch: int, vocab_size: int, arguments: argparse.Namespace
) -> list[tuple[tuple[int, ...], list[int]]]:
    """For each sequence its prompt and the text after it; no text if the model chooses."""
    chance, length = random.Random(0), arguments.new_tokens
    tokens = [[chance.randrange(vocab_size - 1) for _ in range(length)] for _ in range(batch)]
    if text == LOOP:
        return [(tuple(own[:PERIOD]), (own[:PERIOD] * length)[:length]) for own in tokens]
    if text == EDIT:
        return [(tuple(own), edited(own, chance)) for own in tokens]
    return [(tuple(own), []) for own in tokens]


def edited(tokens: list[int], chance: random.Random) -> list[int]:
    """As many tokens, of which about one in EVERY is changed, added or left out."""
    out: list[int] = []
    for token in tokens:
        out += chance.choice([[0], [token, 0], []]) if chance.random() < 1 / EVERY else [token]
    return (out + tokens)[: len(tokens)]


def compare(
    engines: Sequence[Engine], texts: list[tuple[tuple[int, ...], list[int]]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs both engines in turn. The ratio is the median over the rounds; `spread` its least and most."""
    turns: list[list[Turn]] = [[], []]
    for number in range(arguments.turns + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            turn = run_turn(engines[which], texts, arguments.new_tokens, seed=number)
            if number:
                turns[which].append(turn)
    off, on = turns
    if [turn.tokens for turn in off] != [turn.tokens for turn in on]:
        raise SystemExit("the texts with and without speculation differ")
    rates = [[turn.rate for turn in of] for of in turns]
    ratios = [b / a for a, b in zip(*rates, strict=True)]
    drafted = sum(turn.drafted for turn in on)
    return {
        "without": round(statistics.median(rates[0]), 1),
        "with": round(statistics.median(rates[1]), 1),
        "ratio": round(median_ratio(rates[1], rates[0]), 3),
        "spread": (round(min(ratios), 3), round(max(ratios), 3)),
        "steps": round(sum(turn.steps for turn in on) / sum(turn.steps for turn in off), 3),
        "accepted": round(sum(turn.accepted for turn in on) / drafted, 3) if drafted else 0.0,
    }


def run_turn(engine: Engine, texts: list[tuple[tuple[int, ...], list[int]]], new_tokens: int, seed: int) -> Turn:
    """Decodes all texts together. A request's seed says which text is its."""
    choose, before = engine.runner.next_tokens, engine.stats()

    def follow_script(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        chosen = choose(logits, rows)  # its time counts
        places = [(texts[row.seed - seed][1], len(row.tokens) - row.prompt_length) for row in rows]
        return [text[place] if text else token for (text, place), token in zip(places, chosen, strict=True)]

    engine.runner.next_tokens = follow_script  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {}
    for number, (prompt, _) in enumerate(texts):
        params = SamplingParams(seed=seed + number, max_new_tokens=new_tokens, ignore_eos=True)
        engine.add(Request(str(number), prompt, params))
    begun, start = 0, 0.0
    while engine.busy:
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
        if not start and len(tokens) == len(texts):
            begun, start = sum(map(len, tokens.values())), time.perf_counter()
    rate = (sum(map(len, tokens.values())) - begun) / (time.perf_counter() - start)
    engine.runner.next_tokens = choose  # type: ignore[method-assign]
    after = engine.stats()
    return Turn(
        rate,
        tokens,
        after.steps_total - before.steps_total,
        after.draft_tokens_total - before.draft_tokens_total,
        after.accepted_tokens_total - before.accepted_tokens_total,
    )


if __name__ == "__main__":
    sys.exit(main())
