"""Measures how many questions a model answers right: `python -m bench.chat MODEL --base BASE --count 40`.

The questions are those that the built-in conversations leave out (train_job/data/tasks.py). They are answered greedily,
in batches. An answer is exact if it is the expected text, apart from white space around it. `ended` is the share of
answers that end by themselves within 64 tokens. A base without a chat template gets the messages as plain text, a line
each, and its answer is the line that it continues with. It prints one JSON line last.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.command import print_report
from gptcore import hub
from gptcore.chat import chat_template
from gptcore.engine import EngineSettings, FinishReason, Request, Update
from gptcore.engine.engine import Engine
from gptcore.engine.interface import merge
from gptcore.errors import PackageError
from gptcore.package import Package, open_package
from gptcore.sampling import SamplingParams
from train_job.data.tasks import KINDS, Question, held_out

NEW_TOKENS = 64
"""Most tokens of an answer."""


@dataclass(frozen=True)
class Answer:
    """What a model answers, and whether it `ended` within NEW_TOKENS."""

    text: str
    ended: bool


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the JSON line. Returns 2 for bad input."""
    arguments = parse(argv)
    return print_report(lambda _: measure(arguments))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.chat", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", nargs="?", default="models:/gpt-chat@champion", help=hub.KINDS)
    parser.add_argument("--base", help="the model before it learned from conversations, to compare with")
    parser.add_argument("--count", type=int, default=40, help="questions of each kind")
    parser.add_argument("--dtype", default="auto", help="the engine's precision: auto, bfloat16 or float32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"--count is {arguments.count}; expected at least 1")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Asks the model and its base, prints the table, and returns the report."""
    count = arguments.count
    questions = [question for kind in KINDS for question in held_out(kind, count)]
    model = open_package(hub.resolve(arguments.model))
    if chat_template(model.tokenizer) is None:
        raise PackageError(f"{arguments.model} has no chat template; expected a model trained with --objective chat")
    base = open_package(hub.resolve(arguments.base)) if arguments.base else None
    given = ask(model, questions, arguments.dtype, arguments.device)
    given_by_base = ask(base, questions, arguments.dtype, arguments.device) if base else []
    parts: dict[str, slice] = {kind: slice(at * count, (at + 1) * count) for at, kind in enumerate(KINDS)}
    parts["all"] = slice(None)
    rows = {name: judge(questions[part], given[part], given_by_base[part]) for name, part in parts.items()}
    print_table(rows)
    report = {"bench": "chat", "model": arguments.model, "base": arguments.base, "count": count}
    return {**report, "new_tokens": NEW_TOKENS, "kinds": rows}


def judge(questions: Sequence[Question], given: Sequence[Answer], by_base: Sequence[Answer]) -> dict[str, float]:
    """The shares of exact answers and of those that ended; `by_base` may be empty."""
    shares = {"exact": exact(questions, given), "ended": statistics.fmean(answer.ended for answer in given)}
    return shares | ({"base_exact": exact(questions, by_base)} if by_base else {})


def exact(questions: Sequence[Question], given: Sequence[Answer]) -> float:
    return statistics.fmean(
        answer.text.strip() == question.answer for question, answer in zip(questions, given, strict=True)
    )


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each kind."""
    print(f"{'kind':10}{'exact':>8}{'base':>8}{'ended':>8}")
    for name, row in rows.items():
        base = f"{row['base_exact']:8.1%}" if "base_exact" in row else f"{'-':>8}"
        print(f"{name:10}{row['exact']:8.1%}{base}{row['ended']:8.1%}", flush=True)


def ask(package: Package, questions: Sequence[Question], dtype: str, device: str) -> list[Answer]:
    """The greedy answers of a model, to all questions at once. Raises ConfigError if one does not fit its context."""
    tokenizer, template = package.tokenizer, chat_template(package.tokenizer)
    if template:
        prompts = [template.encode(question.messages) for question in questions]
    else:
        texts = ["".join(f"{message['content']}\n" for message in question.messages) for question in questions]
        prompts = [tokenizer.encode_prompt(text) for text in texts]
    settings = EngineSettings(
        max_context=max(map(len, prompts)) + NEW_TOKENS,
        prefill_tokens=1024,
        max_queue=len(prompts),
        dtype=dtype,
        device=device,
    )
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, stop=() if template else ("\n",))
    updates: list[list[Update]] = [[] for _ in prompts]
    engine = Engine(package, settings)
    try:
        for number, prompt in enumerate(prompts):
            engine.add(Request(str(number), tuple(prompt), params))
        while engine.busy:
            for update in engine.step():
                updates[int(update.request_id)].append(update)
    finally:
        engine.close()
    whole = [merge(parts) for parts in updates]
    return [Answer(each.text, each.finish_reason is FinishReason.STOP) for each in whole]


if __name__ == "__main__":
    sys.exit(main())
