"""The autoscaling benchmark plays the same day for the same seed, and its sums are right. No test judges a speed."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.autoscaling import (
    Played,
    Sample,
    arrivals,
    cost,
    count_replicas,
    day,
    hour_row,
    main,
    most_requests,
    parse,
    rate_at,
    replica_seconds,
    summary,
)
from bench.load import Reply
from bench.paced import PacedEngine
from bench.weights import random_package
from gptcore.engine import EngineSettings, Request
from gptcore.sampling import SamplingParams
from tests.refusals import one_error


def test_the_day_begins_at_its_quietest_hour_and_peaks_at_the_given_rate() -> None:
    hours = day(10.0)
    rates = [hour.rate for hour in hours]
    assert (len(hours), hours[0].name, hours[-1].name) == (24, "06:00", "05:00")
    assert (min(rates), max(rates)) == (rates[0], 10.0)
    assert hours[rates.index(10.0)].name == "14:00"
    assert sum(day(20.0)[i].rate for i in range(24)) == pytest.approx(2 * sum(rates))


def test_the_rate_is_an_hours_own_in_its_middle_and_changes_in_straight_lines() -> None:
    rates = [2.0, 4.0, 10.0]
    assert [rate_at(rates, hour) for hour in (0.5, 1.5, 2.5)] == rates
    assert rate_at(rates, 1.0) == 3.0
    assert rate_at(rates, 0.0) == rate_at(rates, 3.0) == 6.0  # round the clock


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert arrivals([5.0, 1.0], 30, seed=1) == arrivals([5.0, 1.0], 30, seed=1)
    assert arrivals([5.0, 1.0], 30, seed=1) != arrivals([5.0, 1.0], 30, seed=2)


def test_arrivals_follow_the_rates() -> None:
    times = arrivals([10.0, 10.0, 2.0, 2.0], 1000, seed=0)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 4000
    busy = [t for t in times if 500 <= t < 1500]  # between the middles of the first two hours, the rate is 10
    quiet = [t for t in times if 2500 <= t < 3500]
    assert len(busy) == pytest.approx(10_000, rel=0.05)
    assert len(quiet) == pytest.approx(2_000, rel=0.1)


def test_a_replica_completes_its_slots_over_the_time_of_a_request() -> None:
    assert most_requests(parse(["--slots=8", "--step-ms=25", "--new-tokens=64"])) == pytest.approx(8 / (0.025 * 64.5))


def test_replicas_cost_the_time_that_they_run() -> None:
    samples = [Sample(0, 0, 2), Sample(10, 5, 2), Sample(20, 9, 4), Sample(30, 0, 4)]
    assert replica_seconds(samples) == 2 * 20 + 4 * 10
    assert cost(7200, price=3.0, tokens=600_000) == 0.01
    assert cost(7200, price=3.0, tokens=0) is None


def test_the_report_has_load_and_replicas_by_the_hour_and_the_cost_of_the_day() -> None:
    arguments = parse(["--min-replicas=1", "--max-replicas=4", "--price=3.6"])
    hours = day(10.0)
    samples = [Sample(at, at, 1 + (at >= 25)) for at in range(481)]
    replies = [Reply(1.0, [1.1, 1.3], 300), Reply(5.0, [5.2], 100), Reply(21.0, [], 0, "status 500")]
    played = Played([1.0, 5.0, 21.0], replies, samples)
    first = hour_row(arguments, hours, 0, 20.0, 5.0, played)
    assert (first["requests_per_second"], first["planned_replicas"]) == (0.1, 1)
    assert (first["replicas"], first["ongoing"]) == (1, 9.5)
    assert first["first_token_ms"]["p50"] == 150
    second = hour_row(arguments, hours, 1, 20.0, 5.0, played)
    assert (second["fewest_replicas"], second["most_replicas"], second["replicas"]) == (1, 2, 1.8)
    busiest = next(i for i, hour in enumerate(hours) if hour.rate == 10.0)
    assert hour_row(arguments, hours, busiest, 20.0, 5.0, played)["planned_replicas"] == 2
    whole = summary(arguments, played)
    assert (whole["requests"], whole["failed"], whole["errors"]) == (3, 1, ["after 21.0 s: status 500"])
    assert (whole["tokens"], whole["replica_seconds"], whole["replica_changes"]) == (400, 25 + 2 * 455, 1)
    assert whole["saved"] == round(1 - 935 / 1920, 3)
    assert whole["dollars_per_1000_tokens"] == round(935 * 0.001 / 0.4, 6)


def test_an_hour_in_which_a_busy_machine_saw_nothing_has_the_nearest_sample() -> None:
    played = Played([], [], [Sample(3.0, 1, 2), Sample(30.0, 7, 3), Sample(70.0, 9, 4)])
    rows = [hour_row(parse(["--price=1"]), day(10.0), i, 10.0, 5.0, played) for i in range(8)]
    assert [row["replicas"] for row in rows] == [2, 2, 3, 3, 3, 4, 4, 4]


def test_a_paced_engine_takes_its_time_for_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.paced.time.monotonic", lambda: now[0])
    monkeypatch.setattr("bench.paced.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    package = random_package(tmp_path / "package", "tiny", vocab_size=300)
    engine = PacedEngine(0.5, package, EngineSettings(dtype="float32", device="cpu", threads=1, slots=2))
    engine.add(Request("a", (1, 2, 3), SamplingParams(max_new_tokens=4, ignore_eos=True)))
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert steps == 4
    assert now[0] == pytest.approx(0.5 * steps)


def test_processes_that_are_no_replicas_are_not_counted() -> None:
    assert count_replicas(psutil.Process()) == 0


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--minutes=0"], "--minutes is 0.0; expected more than 0"),
        (["--price=nan"], "--price is nan; expected more than 0"),
        (["--step-ms=-1"], "--step-ms is -1.0; expected more than 0"),
        (["--min-replicas=5"], "--min-replicas is 5; expected 1 to 4"),
        (["--steady", "0.5", "0"], "--steady is 0.0; expected shares of more than 0"),
        (["--gpu=h300"], "Did you mean 'h200'?"),
        (["--gpu=l4"], "give --price"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    flags: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert answer in one_error(capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.release
def test_the_command_plays_a_day_without_a_failed_request(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--minutes=0.5 --min-replicas=1 --max-replicas=2 --slots=2 --new-tokens=8 --peak=2 --price=1"
    assert main(command.split()) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["bench"], report["failed"], report["target_ongoing_requests"]) == ("autoscaling", 0, 1.4)
    assert report["requests"] > 0
    assert len(report["hours"]) == 24
    assert report["dollars_per_1000_tokens"] > 0
