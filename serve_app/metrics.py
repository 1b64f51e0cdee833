"""The service's metrics, each defined once, with the names that other servers use.

`/metrics` renders them in Prometheus' text format, one registry per app. An optional sink gets the same values:
`deployment.py` passes one that feeds Ray's exporter, where the names begin with `ray_`. `python -m serve_app.metrics`
prints the docs' table.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from gptcore.engine import FinishReason, Update

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


@dataclass(frozen=True)
class Metric:
    """One metric's definition, for both exporters and the docs."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in seconds."""


MODEL = ("model", "version")
WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAPS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)

REQUESTS = Metric(
    "gpt_requests_total",
    "counter",
    "HTTP requests answered; model and version are empty if no model was involved.",
    ("route", "status", *MODEL),
)
SEQUENCES = Metric(
    "gpt_request_success_total",
    "counter",
    "Finished sequences, by reason: stop, length, abort (the client left or a time limit passed) or error.",
    (*MODEL, "finished_reason"),
)
PROMPT_TOKENS = Metric("gpt_prompt_tokens_total", "counter", "Prompt tokens of started sequences.", MODEL)
CACHED_TOKENS = Metric("gpt_prompt_tokens_cached_total", "counter", "Prompt tokens found in the prefix cache.", MODEL)
GENERATED_TOKENS = Metric("gpt_generation_tokens_total", "counter", "Generated tokens.", MODEL)
DRAFT_TOKENS = Metric(
    "gpt_spec_decode_num_draft_tokens_total", "counter", "Draft tokens computed (speculation).", MODEL
)
ACCEPTED_TOKENS = Metric(
    "gpt_spec_decode_num_accepted_tokens_total", "counter", "Draft tokens accepted; each saved a step.", MODEL
)
FIRST_TOKEN = Metric(
    "gpt_time_to_first_token_seconds", "histogram", "Time from the request to its first token.", MODEL, WAITS
)
NEXT_TOKEN = Metric(
    "gpt_inter_token_latency_seconds", "histogram", "Time between two tokens of a sequence.", MODEL, GAPS
)
LATENCY = Metric(
    "gpt_e2e_request_latency_seconds", "histogram", "Time from the request to a sequence's last token.", MODEL, WAITS
)
QUEUE = Metric("gpt_request_queue_time_seconds", "histogram", "Time spent waiting for a slot.", MODEL, WAITS)
RELOADS = Metric(
    "gpt_model_reloads_total",
    "counter",
    "Attempts to load a new version from the registry, by outcome: success, or failure (the old version stays).",
    ("model", "outcome"),
)
FEEDBACK = Metric(
    "gpt_feedback_total",
    "counter",
    "Votes on answers, by score: 1 (good) or -1 (bad); model and version are those the client names, if loaded.",
    (*MODEL, "score"),
)
RUNNING = Metric("gpt_num_requests_running", "gauge", "Sequences that have a slot.", MODEL)
WAITING = Metric("gpt_num_requests_waiting", "gauge", "Sequences waiting for a slot.", MODEL)
SLOTS = Metric("gpt_slots", "gauge", "Slots of the engine: how many sequences it decodes together.", MODEL)
SLOTS_USED = Metric("gpt_slots_used", "gauge", "Slots in use.", MODEL)
LOADED = Metric("gpt_model_loaded", "gauge", "1 for each model version that this replica has loaded.", MODEL)

METRICS = (
    REQUESTS,
    SEQUENCES,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    GENERATED_TOKENS,
    DRAFT_TOKENS,
    ACCEPTED_TOKENS,
    FIRST_TOKEN,
    NEXT_TOKEN,
    LATENCY,
    QUEUE,
    RELOADS,
    FEEDBACK,
    RUNNING,
    WAITING,
    SLOTS,
    SLOTS_USED,
    LOADED,
)

Reading = tuple[Metric, tuple[str, ...], float]
"""A gauge, its labels' values, and its value."""
Sink = Callable[[Metric, dict[str, str], float], None]
"""Receives a counter's increment, a histogram's observation, or a gauge's value."""


class Metrics:
    """The metrics of one app, safe to use from several threads.

    `gauges` returns the engines' current values. It is called at a scrape, and by `push_gauges` for the sink.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self.gauges: Callable[[], Iterable[Reading]] = tuple
        self._sink = sink
        self._registry = CollectorRegistry()
        self._kept = {metric.name: _prometheus(metric, self._registry) for metric in METRICS}
        self._adders: dict[tuple[str, tuple[str, ...]], Callable[[float], None]] = {}
        self._pushed: set[tuple[Metric, tuple[str, ...]]] = set()
        ProcessCollector(registry=self._registry)

    def request(self, route: str, status: int, model: str, version: str) -> None:
        """Count an answered HTTP request. `route` is the route's template, never the client's path."""
        self._record(REQUESTS, (route, str(status), model, version))

    def reload(self, model: str, succeeded: bool) -> None:
        """Count an attempt to load a new version from the registry."""
        self._record(RELOADS, (model, "success" if succeeded else "failure"))

    def feedback(self, model: str, version: str, score: int) -> None:
        """Count a vote on an answer."""
        self._record(FEEDBACK, (model, version, str(score)))

    def sequence(self, model: str, version: str, since: float) -> "SequenceTimer":
        """A timer for a sequence of a request that came at `since` (perf_counter); pass it every update, then close."""
        return SequenceTimer(self._record, (model, version), since)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        gauges = {name: kept for name, kept in self._kept.items() if isinstance(kept, Gauge)}
        for gauge in gauges.values():
            gauge.clear()  # removes the values of versions that are gone
        for metric, labels, value in self.gauges():
            gauges[metric.name].labels(*labels).set(value)
        return generate_latest(self._registry)

    def push_gauges(self) -> None:
        """Send the gauges to the sink, which keeps the last value. Call it every few seconds."""
        if self._sink is None:
            return
        readings = {(metric, labels): value for metric, labels, value in self.gauges()}
        for metric, labels in self._pushed | readings.keys():
            self._sink(metric, _named(metric, labels), readings.get((metric, labels), 0.0))
        self._pushed = set(readings)

    def _record(self, metric: Metric, labels: tuple[str, ...], value: float = 1.0) -> None:
        """Add to a counter, or observe."""
        key = (metric.name, labels)
        if key not in self._adders:
            self._adders[key] = self._adder(metric, labels)
        self._adders[key](value)

    def _adder(self, metric: Metric, labels: tuple[str, ...]) -> Callable[[float], None]:
        """The function that records a value for these labels, looked up once since it runs for every token."""
        kept, sink = self._kept[metric.name], self._sink
        add = kept.labels(*labels).observe if isinstance(kept, Histogram) else kept.labels(*labels).inc
        if sink is None:
            return add
        named = _named(metric, labels)

        def add_and_send(value: float) -> None:
            add(value)
            sink(metric, named, value)

        return add_and_send


class SequenceTimer:
    """Counts and times one sequence. One closed before its last update counts as aborted."""

    def __init__(
        self, record: Callable[[Metric, tuple[str, ...], float], None], labels: tuple[str, ...], since: float
    ) -> None:
        self._record = record
        self._labels = labels
        self._started = since
        self._latest: float | None = None  # when the latest token came
        self._open = True

    def update(self, update: Update) -> None:
        """Record an update. Several tokens of one update share the time since the previous update equally."""
        now = time.perf_counter()
        tokens = len(update.token_ids)
        if self._latest is None and (tokens or update.finish_reason == FinishReason.LENGTH):
            self._begun(update)
            if tokens:  # none if only the prompt was scored
                self._record(FIRST_TOKEN, self._labels, now - self._started)
        elif self._latest is not None:
            for _ in range(tokens):
                self._record(NEXT_TOKEN, self._labels, (now - self._latest) / tokens)
        if tokens:
            self._record(GENERATED_TOKENS, self._labels, tokens)
            self._latest = now
        if update.draft_tokens:
            self._record(DRAFT_TOKENS, self._labels, update.draft_tokens)
            self._record(ACCEPTED_TOKENS, self._labels, update.accepted_tokens)
        if update.finish_reason:
            self._end(str(update.finish_reason), now)

    def close(self) -> None:
        """Record the end, if no last update came."""
        if self._open:
            self._end("abort", time.perf_counter())

    def _begun(self, update: Update) -> None:
        self._record(QUEUE, self._labels, update.queue_seconds)
        self._record(PROMPT_TOKENS, self._labels, update.prompt_tokens)
        if update.cached_tokens:
            self._record(CACHED_TOKENS, self._labels, update.cached_tokens)

    def _end(self, reason: str, now: float) -> None:
        self._open = False
        self._record(SEQUENCES, (*self._labels, reason), 1.0)
        self._record(LATENCY, self._labels, now - self._started)


def _named(metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))


def _prometheus(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


def markdown(metrics: Sequence[Metric] = METRICS) -> str:
    """The docs' table: name, kind, labels, meaning."""
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |" for m in metrics]
    return "\n".join(["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(markdown())
