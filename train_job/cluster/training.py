"""The driver's side of training: Ray Train in a thread, and the workers' events as they come.

In: an open `Session` and what each worker gets. Out: events, printed and kept for the loss curve; in the end a
`Trained`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gptcore.errors import ConfigError, FoundryError, TrainingError
from gptcore.progress import FIRST_SECONDS, doing
from gptcore.redact import without_password
from train_job.cluster.channel import start_channel
from train_job.cluster.connect import (
    resources_per_worker,
    resources_text,
    torch_trainer,
    training_first,
    workers_text,
)
from train_job.cluster.failures import SMALLER, Failure, last_line, why
from train_job.data.inputs import initial_parameters
from train_job.files import storage_problem
from train_job.session.session import Session, Trained, label, resume_command
from train_job.training.events import Evaluation, Finished, Progress, Started
from train_job.training.storage import forget_rays_record

SILENCE_SECONDS = 45.0
"""How long workers that train may send nothing before the driver says that it waits: until then they said enough."""
LOST_SECONDS = 10.0
"""How long Ray Train may take to notice what it has lost."""
POLL_SECONDS = 1.0
"""How often the driver reads events; on a small machine every read costs the worker a little."""


class Training:
    """The workers of one session, from the first to the last event.

    `on_restart` is told when Ray has started the workers again. `own_ray`: no other job shares this Ray.
    """

    def __init__(
        self,
        session: Session,
        resources: dict[str, float],
        own_ray: bool = False,
        on_restart: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._session, self._resources, self._own_ray, self._on_restart = session, resources, own_ray, on_restart
        self._channel: Any = None
        self._failure: Failure | None = None  # of workers that Ray has not started again yet
        self._began: Started | None = None
        self._finished: Finished | None = None
        self._problem: FoundryError | None = None
        self._memory: dict[str, float] = {}

    @property
    def began(self) -> bool:
        """Whether a worker has got as far as its first step."""
        return self._began is not None

    @property
    def trained(self) -> Trained:
        """How it ended; final once `run` has ended."""
        return Trained(self._began, self._finished, self._problem, self._memory)

    def stop(self) -> None:
        """Asks the workers to save a checkpoint and end."""
        if self._channel:
            self._channel.set_stop.remote()

    def introduce(self, nodes: list[dict[str, Any]]) -> None:
        """Prints what is about to happen, before the first step."""
        s, i, say = self._session, self._session.inputs, self._session.console.say
        low, high = s.config.workers
        workers = str(low) if low == high else f"{low} to {high}"
        say(f"model     {without_password(label(i))}")
        say(f"text      {i.train_corpus.name}: {i.train.size}, {i.train.num_tokens:,} tokens by")
        say(f"          {i.tokenizer.name}; {i.validation.size} more are kept for validation")
        for note in i.notes:
            say(f"          {note}")
        say(f"workers   {workers}, each with {resources_text(self._resources)}")
        try:
            resources_per_worker(s.config, nodes, fixed=True)
        except ConfigError as error:
            say(f"waiting   for the cluster to grow: {error}")
        say(f"run       {s.config.name} ({s.run_id})")
        say(f"tracking  {without_password(s.uri)}")

    def run(self, ray: Any) -> Iterator[list[Any]]:
        """Trains; yields the workers' events after printing them, if only an empty list, every POLL_SECONDS.

        Ray Train has a thread of its own, so that the caller's can show progress and act on signals. Raises
        KeyboardInterrupt if the session was told to stop before a worker had anything to save.
        """
        from train_job.cluster.worker import WorkerSpec, train_worker

        s, inputs = self._session, self._session.inputs
        forget_rays_record(s.config)
        channel = start_channel(ray)
        spec = WorkerSpec(
            config=s.config,
            model=inputs.model,
            tokenizer=inputs.tokenizer,
            train=inputs.train_corpus,
            validation=inputs.validation_corpus,
            initial={name: ray.put(weight) for name, weight in initial_parameters(inputs)},
            base=inputs.parent.weights_hash() if inputs.parent and s.config.lora else "",
            run_id=s.run_id,
            tracking_uri=s.uri,
            run_dir=s.run_dir,
            channel=channel,
        )
        trainer = torch_trainer(train_worker, spec, self._resources, self._own_ray)
        ended: list[Any] = []

        def fit() -> None:
            try:
                ended.append(trainer.fit())
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        s.stops.check()
        self._channel = channel
        thread.start()
        try:
            yield from self._follow(ray, channel, thread)
            self._problem = ray.get(channel.failed.remote())
        except ray.exceptions.RayError as error:  # the channel is lost, and so is more: Ray's own error comes first
            thread.join(LOST_SECONDS)
            ended = ended or [error]
        self._channel = None
        if isinstance(ended[0], Exception):
            said = self._failure.why if self._failure else why(ended[0])
            full = storage_problem(RuntimeError(last_line(ended[0])), s.config.storage_path)
            lost = TrainingError(f"training failed: {said}; go on with: {self._next_try(said)}")
            self._problem = self._problem or full or lost
        else:
            self._memory = ended[0].return_value or {}

    def _follow(self, ray: Any, channel: Any, thread: threading.Thread) -> Iterator[list[Any]]:
        """The events while the thread runs, and those that are left then."""
        training = False
        with doing(self._awaited) as wait:
            while thread.is_alive():
                yield self._show(ray.get(channel.read.remote()))
                before, training = training, bool(self._began and not self._failure)
                if training != before:
                    wait.due = SILENCE_SECONDS if training else FIRST_SECONDS
                if not self._began:
                    self._session.stops.check()  # workers may take long to start, and have nothing to save
                thread.join(POLL_SECONDS)
        yield self._show(ray.get(channel.read.remote()))

    def _awaited(self) -> str:
        """What the driver is waiting for."""
        if self._failure:
            return f"waiting for Ray to start the workers again: {self._failure.why}"
        if self._began:
            return "waiting for news of the workers"
        workers = workers_text(*self._session.config.workers)
        return f"waiting for Ray to start {workers}, with {resources_text(self._resources)} each"

    def _show(self, events: list[Any]) -> list[Any]:
        """Prints events and keeps what the loss curve is drawn from; returns them."""
        s = self._session
        for event in events:
            if isinstance(event, str):
                s.console.say(event)
            elif isinstance(event, Failure):
                self._failure = event
            elif isinstance(event, Started):
                self._started(event)
            elif isinstance(event, Progress):
                s.console.progress(event)
                s.history.add(event)
            elif isinstance(event, Evaluation):
                s.console.evaluation(event, "the parent" if s.config.init_from else "before training")
                s.history.add(event)
            elif isinstance(event, Finished):
                self._finished = event
        return events

    def _started(self, event: Started) -> None:
        say = self._session.console.say
        if self._own_ray:
            training_first()
        if self._began:
            reason = self._failure.why if self._failure else "Ray has changed the number of workers"
            text = f"restarted from step {event.step} with {workers_text(event.workers)}: {reason}"
            if SMALLER in reason:
                text += f". If that goes on, stop the run and use: {self._next_try(reason)}"
            say(text)
            self._on_restart(text)
        elif event.step:
            say(f"resumed   from step {event.step}")
        self._began, self._failure = self._began or event, None

    def _next_try(self, reason: str) -> str:
        """The command that goes on after a failure, with half the memory for activations if that was too little."""
        config = self._session.config
        if SMALLER not in reason:
            return resume_command(config)
        micro = config.micro_batch_size or math.ceil(config.batch_size / config.workers[1])
        return f"{resume_command(config)} --micro-batch-size {max(1, micro // 2)}"
