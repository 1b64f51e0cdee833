"""Hints for misspelt names: a typo gets a hint, a distant name gets none."""

import time

import pytest

from gptcore.errors import did_you_mean

SLIPS = [
    ("storys.txt", "stories.txt"),
    ("rhymes.txt", "rhyme.txt"),
    ("stories.text", "stories.txt"),
    ("Notes.txt", "notes.txt"),
    ("shakspeare", "shakespeare"),
    ("shakespear", "shakespeare"),
    ("--batchsize", "--batch-size"),
    ("--max-step", "--max-steps"),
    ("lern_rate", "learning_rate"),
    ("temprature", "temperature"),
    ("temperture", "temperature"),
    ("temp", "temperature"),
    ("checkpoint", "checkpoint_interval"),
    ("champoin", "champion"),
    ("cosin", "cosine"),
    ("lineer", "linear"),
    ("fp23", "fp32"),
    ("gpt3", "gpt2"),
    ("h300", "h200"),
    ("bf16", "bfloat16"),
    ("cdua", "cuda"),
    ("part-1.txt", "part-2.txt"),
    ("gtp2", "gpt2"),
    ("gpt-2", "gpt2"),
    ("bpe2048", "bpe:2048"),
    ("byte", "bytes"),
    ("mien", "mine"),
    ("txt", "text"),
    ("Text", "text"),
    ("adam", "adamw"),
    ("qwen", "qwen3"),
    ("promte", "promote"),
    ("if_better", "if-better"),
    ("max_new_tokens", "max_tokens"),
    ("/v1/completion", "/v1/completions"),
    ("/v1/chat", "/v1/chat/completions"),
]
STRANGERS = [
    ("nofile.txt", "utf16.txt"),
    ("notes.txt", "constraints.txt"),
    ("a.txt", "b.txt"),
    ("data.json", "deva.json"),
    ("nope", "none"),
    ("nope", "name"),
    ("test", "text"),
    ("user", "seed"),
    ("no", "on"),
    ("", "x"),
    ("skip_special_tokens", "max_tokens"),
    ("store", "stream"),
    ("stream_options", "stop_sequences"),
    ("length_penalty", "temperature"),
    ("builtin", "within"),
    ("yesterday", "quick-20260101-120000"),
    ("same", "same"),
]


@pytest.mark.parametrize(("value", "name"), SLIPS)
def test_a_typo_gets_the_intended_name_as_a_hint(value: str, name: str) -> None:
    assert did_you_mean(value, ["something", name, "else"]) == f" Did you mean {name!r}?"


@pytest.mark.parametrize(("value", "name"), STRANGERS)
def test_a_distant_name_gets_no_hint(value: str, name: str) -> None:
    assert did_you_mean(value, [name]) == ""


def test_the_nearest_of_several_names_is_the_hint() -> None:
    assert "'eval_interval'" in did_you_mean("evalinterval", ["log_interval", "eval_intervals", "eval_interval"])
    assert "'max_step'" in did_you_mean("max_ste", ["max_steps_of_all", "max_step"])


def test_hints_are_fast_for_many_files_and_very_long_values() -> None:
    start = time.process_time()
    did_you_mean("part-012345x.txt", [f"part-{n:06}.parquet" for n in range(5_000)])
    did_you_mean("x" * 1_000_000, ["y" * 30] * 100)
    assert time.process_time() - start < 10
