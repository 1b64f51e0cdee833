"""The serving benchmark sends the same requests to all contestants. These tests do not judge speeds."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load import (
    Load,
    Reply,
    figures,
    first_token_seconds,
    open_engine,
    open_service,
    read_reply,
    tokens_per_second,
)
from bench.serve import compare, main, naive_service
from bench.turns import Results
from bench.weights import random_package
from gptcore.engine import EngineSettings
from gptcore.package import Package

EVENTS = [b'data: {"text": "a"}\n\n', b'data: {"text": "b"}\n\n', b'data: {"usage": {"completion_tokens": 2}}\n\n']
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return random_package(tmp_path_factory.mktemp("serve") / "package", "tiny")


@pytest.fixture
def load(package: Package) -> Load:
    return Load(str(package.path), concurrency=2, requests=2, prompt_tokens=20, new_tokens=8, threads=1)


@pytest.fixture
def naive(load: Load, tmp_path: Path) -> Iterator[Load]:
    """The load, with the app around transformers running."""
    pytest.importorskip("transformers")
    with naive_service(load, "float32", tmp_path) as url:
        yield replace(load, urls={"naive": url})


def test_no_two_requests_begin_alike_and_all_contestants_get_the_same(load: Load) -> None:
    asked = [load.ask(turn, stream, number) for turn in range(3) for stream in range(4) for number in range(4)]
    assert len({prompt[:12] for prompt, _ in asked}) == len(asked)
    assert load.ask(1, 2, 3) == load.ask(1, 2, 3)


def test_prompts_have_about_the_requested_length(load: Load, package: Package) -> None:
    wanted = replace(load, prompt_tokens=64)
    lengths = [len(package.tokenizer.encode(wanted.ask(0, stream, 0)[0])) for stream in range(20)]
    assert all(60 <= length <= 68 for length in lengths)


def test_lengths_differ_around_the_mean(load: Load) -> None:
    lengths = [load.ask(turn, 0, 0)[1] for turn in range(200)]
    assert (min(lengths), max(lengths)) == (4, 12)


def test_the_engine_and_the_app_around_transformers_answer_the_whole_load(naive: Load) -> None:
    asked = sorted(naive.ask(0, stream, number)[1] for stream in range(2) for number in range(2))
    engine, _ = open_engine(naive, "float32", EngineSettings(dtype="float32", device="cpu", threads=1, slots=2))
    client, _ = open_service(naive, "float32", "naive")
    for run_turn in (engine, client):
        replies = run_turn()
        assert [reply.error for reply in replies] == [""] * 4
        assert sorted(reply.tokens for reply in replies) == asked
        assert all(reply.arrivals and reply.sent < reply.arrivals[0] for reply in replies)


def test_a_reply_without_all_its_tokens_and_done_is_an_error() -> None:
    times = [1.0, 2.0, 3.0]
    good = read_reply(0.0, times, [*EVENTS[:2], EVENTS[2] + DONE], 2, 200)
    assert good == Reply(0.0, [1.0, 2.0], 2)  # the usage is not text
    assert read_reply(0.0, times, [*EVENTS[:2], EVENTS[2] + DONE], 3, 200).error
    assert read_reply(0.0, times, EVENTS, 2, 200).error
    assert "status 503" in read_reply(0.0, [1.0], [b'{"error": {}}'], 2, 503).error


def test_figures_follow_from_the_times_at_which_text_arrived() -> None:
    turn = [Reply(0.0, [1.0, 1.5, 2.0], 3), Reply(0.5, [1.0, 2.5], 2)]
    assert tokens_per_second(turn) == 2
    assert first_token_seconds(turn) == [1.0, 0.5]
    found = figures([turn, [*turn, Reply(0.0, [], 0, "refused")]])
    assert found["first_token_ms"]["p50"] == 750
    assert found["between_tokens_ms"]["p95"] == 1500
    assert (found["requests"], found["errors"], found["first_error"]) == (5, 1, "refused")


def test_the_service_is_compared_with_the_others_round_by_round() -> None:
    def turn(first: float, seconds: float) -> list[Reply]:
        return [Reply(0.0, [first, seconds], 10)]

    turns = {
        "service bf16": [turn(0.2, 1.0), turn(0.4, 2.0)],
        "engine bf16": [turn(0.1, 0.5), turn(0.3, 1.0)],
        "naive bf16": [turn(0.1, 4.0), turn(0.1, 8.0)],
    }
    labels = {label.split()[0]: label for label in turns}
    compared = compare(Results(turns, {}, {}), labels)
    assert compared == {"of_engine": 0.5, "first_token_added_ms": 100.0, "of_naive": 4.0}


@pytest.mark.slow
@pytest.mark.release
def test_the_command_measures_the_running_service(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--preset tiny --concurrency 2 --prompt-tokens 20 --new-tokens 8 --requests 1 --turns 1 --threads 1"
    assert main(command.split()) == 0
    level = json.loads(capsys.readouterr().out.splitlines()[-1])["concurrency"]["2"]
    assert set(level["contestants"]) == {"engine", "service", "naive"}
    assert all(one["errors"] == 0 for one in level["contestants"].values())
    assert level["of_engine"] > 0
