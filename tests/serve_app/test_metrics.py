"""Metrics: one definition for all exporters, and values that match what happened."""

import itertools
import time
from collections import Counter
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptcore.engine import EngineSettings, FinishReason, Update
from gptcore.engine.engine import Engine
from gptcore.package import Package
from gptcore.sampling import SamplingParams
from serve_app import metrics as module
from serve_app.generation.order import Order
from serve_app.generation.stream import generating
from serve_app.http.app import create_api
from serve_app.metrics import METRICS, Metric, Metrics, markdown
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings
from serve_app.state import AppState
from tests.serve_app.conftest import MakePackage

Labels = dict[str, str]


class Heard:
    """A sink that keeps the sums of counters, the numbers of observations and the latest gauges."""

    def __init__(self) -> None:
        self.values: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def __call__(self, metric: Metric, labels: Labels, value: float) -> None:
        assert tuple(labels) == metric.labels
        key = (metric.name, tuple(labels.values()))
        if metric.kind == "gauge":
            self.values[key] = 0
        self.values[key] += value if metric.kind != "histogram" else 1  # type: ignore[assignment]


def update(
    *tokens: int, end: FinishReason | None = None, queue: float = 0.0, cached: int = 0, generated: int = 0
) -> Update:
    return Update("r", "", tokens, (), end, 5, generated, cached, queue_seconds=queue)


def scraped(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of `/metrics`, by name and labels, as Prometheus reads it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return scraped(metrics).get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of all timers: it shows the list's value, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_every_metric_is_exported_with_its_name_and_type_and_documented():
    families = {family.name: family for family in text_string_to_metric_families(Metrics().render().decode())}
    table = markdown()
    for metric in METRICS:
        name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
        assert families[name].type == metric.kind
        assert families[name].documentation == metric.help
        assert table.count(f"| `{metric.name}` |") == 1


def test_names_and_labels_follow_prometheus_conventions():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("gpt_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.name.endswith("_seconds") == (metric.kind == "histogram")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(bound > 0 for bound in metric.buckets)  # Ray's exporter takes no others


def test_two_apps_do_not_share_metrics():
    one, other = Metrics(), Metrics()
    one.request("/generate", 200, "gpt", "7")
    labels = dict(route="/generate", status="200", model="gpt", version="7")
    assert value(one, "gpt_requests_total", **labels) == 1
    assert value(other, "gpt_requests_total", **labels) == 0


def test_a_sequence_is_timed_from_the_request_to_each_of_its_tokens(clock: list[float]):
    metrics, labels = Metrics(), dict(model="gpt", version="7")
    timer = metrics.sequence("gpt", "7", since=99.75)  # it waited for a lease
    clock[0] += 0.25
    timer.update(update(1, queue=0.25, cached=3))
    clock[0] += 0.125
    timer.update(update(2))
    clock[0] += 0.5
    timer.update(update(3, 4, end=FinishReason.LENGTH))  # two at once share the time
    timer.close()
    found = {name: value(metrics, name, **labels) for name, _ in scraped(metrics)}
    assert found["gpt_time_to_first_token_seconds_sum"] == 0.5
    assert found["gpt_request_queue_time_seconds_sum"] == 0.25
    assert found["gpt_inter_token_latency_seconds_count"] == 3
    assert found["gpt_inter_token_latency_seconds_sum"] == 0.625
    assert value(metrics, "gpt_inter_token_latency_seconds_bucket", **labels, le="0.25") == 3
    assert value(metrics, "gpt_inter_token_latency_seconds_bucket", **labels, le="0.1") == 0
    assert found["gpt_e2e_request_latency_seconds_sum"] == 1.125
    assert found["gpt_prompt_tokens_total"] == 5
    assert found["gpt_prompt_tokens_cached_total"] == 3
    assert found["gpt_generation_tokens_total"] == 4
    assert value(metrics, "gpt_request_success_total", **labels, finished_reason="length") == 1
    assert value(metrics, "gpt_request_success_total", **labels, finished_reason="abort") == 0


def test_guesses_and_right_ones_are_counted():
    metrics, labels = Metrics(), dict(model="gpt", version="7")
    timer = metrics.sequence("gpt", "7", since=0.0)
    timer.update(update(1))
    timer.update(replace(update(1, 2, 3), draft_tokens=4, accepted_tokens=2))
    timer.update(replace(update(4), draft_tokens=3))
    assert value(metrics, "gpt_spec_decode_num_draft_tokens_total", **labels) == 7
    assert value(metrics, "gpt_spec_decode_num_accepted_tokens_total", **labels) == 2


@pytest.mark.parametrize("tokens", [0, 2])
def test_an_abandoned_sequence_counts_once_as_aborted(tokens: int):
    metrics = Metrics()
    timer = metrics.sequence("gpt", "7", time.perf_counter())
    for token in range(tokens):
        timer.update(update(token))
    timer.close()
    timer.close()
    assert value(metrics, "gpt_request_success_total", model="gpt", version="7", finished_reason="abort") == 1
    assert value(metrics, "gpt_e2e_request_latency_seconds_count", model="gpt", version="7") == 1
    assert value(metrics, "gpt_time_to_first_token_seconds_count", model="gpt", version="7") == min(tokens, 1)


def test_reloads_are_counted_by_outcome():
    metrics = Metrics()
    for succeeded in (True, True, False):
        metrics.reload("gpt", succeeded)
    assert value(metrics, "gpt_model_reloads_total", model="gpt", outcome="success") == 2
    assert value(metrics, "gpt_model_reloads_total", model="gpt", outcome="failure") == 1


def test_gauges_are_read_at_each_scrape_and_disappear_with_their_version():
    metrics, versions = Metrics(), ["7"]
    counts = itertools.count(1)
    metrics.gauges = lambda: [(module.RUNNING, ("gpt", version), next(counts)) for version in versions]
    assert value(metrics, "gpt_num_requests_running", model="gpt", version="7") == 1
    assert value(metrics, "gpt_num_requests_running", model="gpt", version="7") == 2
    versions[:] = ["8"]
    assert [labels for name, labels in scraped(metrics) if name == "gpt_num_requests_running"] == [
        (("model", "gpt"), ("version", "8"))
    ]


def test_the_sink_gets_everything_that_prometheus_shows():
    heard = Heard()
    metrics = Metrics(heard)
    timer = metrics.sequence("gpt", "7", time.perf_counter())
    timer.update(update(1, cached=2))
    timer.update(replace(update(2, 3, end=FinishReason.STOP), draft_tokens=2, accepted_tokens=1))
    metrics.request("/generate", 200, "gpt", "7")
    metrics.reload("gpt", False)
    metrics.feedback("gpt", "7", 1)
    metrics.gauges = lambda: [(module.SLOTS, ("gpt", "7"), 16)]
    metrics.push_gauges()
    for metric in METRICS:
        for (name, labels), total in list(heard.values.items()):
            if name == metric.name:
                sample = name + "_count" if metric.kind == "histogram" else name
                assert value(metrics, sample, **dict(zip(metric.labels, labels, strict=True))) == total
    silent = {metric.name for metric in METRICS if metric.kind == "gauge"} - {"gpt_slots"}
    assert {name for name, _ in heard.values} == {metric.name for metric in METRICS} - silent


def test_the_sink_is_told_when_a_gauge_disappears():
    heard = Heard()
    metrics = Metrics(heard)
    metrics.gauges = lambda: [(module.LOADED, ("gpt", "7"), 1)]
    metrics.push_gauges()
    metrics.gauges = lambda: [(module.LOADED, ("gpt", "8"), 1)]
    metrics.push_gauges()
    assert heard.values == {("gpt_model_loaded", ("gpt", "7")): 0, ("gpt_model_loaded", ("gpt", "8")): 1}


@pytest.mark.anyio
async def test_a_request_that_waits_for_a_load_is_timed_from_its_arrival(make_package: MakePackage, clock: list[float]):
    def make(package: Package, told: EngineSettings) -> Engine:
        clock[0] += 8.0
        return Engine(package, told)

    said = tuple(f"{name}={make_package(seed).path}" for seed, name in enumerate(("first", "second")))
    settings = ServeSettings(models=said, slots=1, threads=1, backend="torch", dtype="float32")
    state = AppState(settings, Models(settings, make_engine=make), Metrics())
    await state.models.start()
    order = Order("second", ["Once"], SamplingParams(max_new_tokens=1, ignore_eos=True))
    async with generating(state, "r", order) as generation:
        updates = [update async for _, update in generation]
    assert updates[-1].finish_reason
    found = {name: figure for (name, _), figure in scraped(state.metrics).items()}
    assert found["gpt_time_to_first_token_seconds_sum"] == 8.0
    assert found["gpt_e2e_request_latency_seconds_sum"] == 8.0
    assert found["gpt_request_queue_time_seconds_sum"] < 8.0
    await state.models.close()


@pytest.mark.anyio
async def test_each_name_of_a_source_has_its_own_gauges(package: Package):
    said = (f"one={package.path}", f"other={package.path}")
    settings = ServeSettings(models=said, slots=3, threads=1, backend="torch", dtype="float32")
    state = AppState(settings, Models(settings), Metrics())
    create_api(settings, state.models, state.metrics)
    await state.models.start()
    async with generating(
        state, "r", Order("other", ["Once"], SamplingParams(max_new_tokens=1, ignore_eos=True))
    ) as generation:
        assert [update async for _, update in generation]
    samples = scraped(state.metrics)
    counted = next(labels for name, labels in samples if name == "gpt_generation_tokens_total")
    assert ("model", "other") in counted
    assert samples["gpt_slots", counted] == samples["gpt_slots", (("model", "one"), counted[1])] == 3
    await state.models.close()
