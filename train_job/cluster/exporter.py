"""A run's metrics for Prometheus, through Ray's exporter, which adds the prefix `ray_`.

In: rank 0's events. Out: the gauges that deploy/grafana and deploy/prometheus use. MLflow keeps a run's history; these
are for watching it now, and end with the worker.
"""

import time

from ray.util.metrics import Gauge

from train_job.training.events import Evaluation, Event, Progress

FIGURES = {
    "gpt_training_step": "Steps that are done.",
    "gpt_training_loss": "Training loss since the last figures, in nats per token.",
    "gpt_training_bits_per_byte": "The same in bits per byte of text.",
    "gpt_training_gradient_norm": "Norm of the gradient.",
    "gpt_training_tokens": "Tokens that the run has seen.",
    "gpt_training_tokens_per_second": "Tokens per second over all workers.",
    "gpt_training_mfu_ratio": "Share of the chips' peak, where that is known.",
    "gpt_training_validation_loss": "Loss on the whole validation split, in nats per token.",
    "gpt_training_validation_bits_per_byte": "The same in bits per byte of text.",
    "gpt_training_start_time_seconds": "When the workers started last, in Unix time: a change is a restart.",
}
"""Every gauge with its help text; each has the label `run`."""


class Exporter:
    """The gauges of one run. Belongs to rank 0's worker."""

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(name, said, tag_keys=("run",)) for name, said in FIGURES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._set(start_time_seconds=time.time())

    def report(self, event: Event) -> None:
        """Sets the gauges that the event has figures for."""
        if isinstance(event, Progress):
            self._set(
                step=event.step,
                loss=event.loss,
                bits_per_byte=event.bits_per_byte,
                gradient_norm=event.grad_norm,
                tokens=event.tokens,
                tokens_per_second=event.tokens_per_second,
            )
            if event.mfu is not None:
                self._set(mfu_ratio=event.mfu)
        elif isinstance(event, Evaluation):
            self._set(validation_loss=event.loss, validation_bits_per_byte=event.bits_per_byte)

    def _set(self, **figures: float) -> None:
        for name, value in figures.items():
            self._gauges[f"gpt_training_{name}"].set(value)
