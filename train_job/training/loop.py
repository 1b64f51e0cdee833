"""The training loop, runnable with torch alone: a model and token shards in, a stream of events out.

`Trainer.run` is a generator: it takes steps and yields events. The caller (a Ray worker, a benchmark, a notebook) logs,
saves and prints; while it handles an event, the clock is stopped and the state is consistent. A step is a function of
(config, step number): the number determines the batch, the dropout masks and the learning rate, so a resumed run takes
the same steps. Ranks work on slices of one global batch.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.devices import pick_dtype
from gptcore.errors import TrainingError
from gptcore.lora import is_adapter
from gptcore.loss import IGNORE
from gptcore.model import GPT
from gptcore.progress import doing
from train_job.config import UNBOUNDED, TrainConfig
from train_job.data.packing import training_batches
from train_job.data.shards import TokenSet
from train_job.training.checkpoint import Identity, TrainState, read_checkpoint
from train_job.training.evaluate import validation_nats
from train_job.training.events import CheckpointDue, Evaluation, Event, Finished, Progress, Started
from train_job.training.hardware import peak_flops
from train_job.training.optimizer import Optimizers, learning_rate_factor
from train_job.training.parallel import (
    clip_gradients,
    fill,
    is_sharded,
    materialise,
    prepare_model,
    replicate,
    shard,
    unused_after,
    world_size,
)
from train_job.training.reduce import average_vectors
from train_job.training.targets import TargetStatus, target_statuses


class Trainer:
    """One rank of a run.

    A model on the meta device, which takes no memory, gets the `weights`: names and whole tensors, one at a time.
    `stop_asked` is polled on rank 0. `base` is a hash of the frozen weights, which a checkpoint of adapters lacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: GPT,
        train: TokenSet,
        validation: TokenSet,
        device: torch.device,
        stop_asked: Callable[[], bool] = lambda: False,
        weights: Iterable[tuple[str, Tensor]] = (),
        base: str = "",
    ) -> None:
        self.config, self.device, self.stop_asked, self.base = config, device, stop_asked, base
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = world_size()
        self.batches = training_batches(train, config.context, config.batch_size, config.seed, config.stride)
        self.train, self.validation = train, validation
        self.model, self.sharded = model, is_sharded(config)
        prepare_model(model, config)
        if self.sharded:
            shard(model, config, device)
        elif model.embed_tokens.weight.is_meta:
            materialise(model, device)
        else:
            model.to(device)
        fill(model, weights)
        self.parameters = dict(model.named_parameters())  # a forward pass replaces sharded ones for a while
        self.optimizers = Optimizers(model, config)
        self.runner: Any = model if self.sharded else replicate(model, config, device)
        self.dtype = pick_dtype(config.precision, device)
        self.total_steps, self.limit = config.planned_steps(self.batches.steps_per_epoch)
        self.log_every, self.eval_every = config.intervals(self.total_steps)
        self.save_every = config.checkpoint_interval or self.eval_every
        self.state = TrainState()
        self.trained_seconds, self.began = 0.0, time.perf_counter()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.config.batch_size * self.config.context

    def identity(self, tokenizer_fingerprint: str) -> Identity:
        """The fingerprints that a checkpoint must share with this run."""
        shape = {name: value for name, value in asdict(self.model.config).items() if value is not None}
        shape_text = json.dumps(shape | {"dropout": 0.0}, sort_keys=True)
        data, model = self.train.fingerprint + self.validation.fingerprint, shape_text + self.base
        return Identity(*(hashlib.sha256(s.encode()).hexdigest() for s in (model, tokenizer_fingerprint, data)))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, not copied: parameters, tied ones once, or adapters, and the optimizers' state."""
        kept = {n: p.detach() for n, p in self.parameters.items() if is_adapter(n) or not self.config.lora}
        return kept | self.optimizers.tensors()

    def restore(self, folder: Path) -> None:
        """Restores weights, optimizers and state from a verified checkpoint."""
        self.state = read_checkpoint(folder, self.tensors())

    def run(self) -> Iterator[Event]:
        """Trains until a limit or target. Raises TrainingError, on every rank, if a loss is not finite."""
        state = self.state
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        logged_step, logged_seconds, sums = state.step, 0.0, 0.0
        self.began = time.perf_counter() - state.elapsed
        sync_every = 1 if self.device.type == "cpu" else self.log_every  # reading losses waits for the device
        yield Started(state.step, self.world_size)
        if state.step == 0:
            yield self.evaluate(untrained=True)
        reason = self._limit_reached()
        if self._evaluation_due(reason):  # the run was stopped before this evaluation
            reason = yield from self._evaluate_and_save(reason)
        while not reason:
            clock = time.perf_counter()
            while True:
                loss, norm = self._step(state.step)
                losses.append(loss)
                norms.append(norm)
                state.step += 1
                if state.step % sync_every == 0 or self._event_due(state.step):
                    break
            means, norm_now, asked = self._sync_ranks(losses, norms, time.perf_counter() - self.began)
            sums += sum(means)
            losses, norms = [], []
            state.elapsed = time.perf_counter() - self.began
            self.trained_seconds += time.perf_counter() - clock
            reason = self.limit if state.step >= self.total_steps else asked
            if reason or state.step % self.log_every == 0:
                mean, steps = sums / (state.step - logged_step), state.step - logged_step
                state.best_train_loss = min(state.best_train_loss, mean)
                yield self._progress(mean, norm_now, steps, self.trained_seconds - logged_seconds)
                logged_step, logged_seconds, sums = state.step, self.trained_seconds, 0.0
                reason = reason or self._goal_reached()
            reason = yield from self._evaluate_and_save(reason)
        yield Finished(state.step, reason, state.elapsed, self._target_statuses())

    def _evaluate_and_save(self, reason: str) -> Generator[Event, None, str]:
        """Evaluates this step and asks for a checkpoint if either is due; returns `reason`, or the goal reached."""
        state, loss = self.state, math.inf
        if self._evaluation_due(reason):
            evaluation = self.evaluate()
            state.elapsed = time.perf_counter() - self.began
            yield evaluation
            reason, loss = reason or self._goal_reached(), evaluation.loss
        if reason or loss < math.inf or state.step % self.save_every == 0:
            yield CheckpointDue(state.step, loss)
        return reason

    def evaluate(self, untrained: bool = False) -> Evaluation:
        """Evaluates on the whole validation split, divided among ranks, and records the best loss.

        Step 0 (random weights, or the parent's) is only for comparison: it is not saved, and does not count for
        patience and targets.
        """
        state, start = self.state, time.perf_counter()
        micro = self.config.micro_batch_size or math.ceil(self.config.batch_size / self.world_size)
        with self.autocast(), doing(f"evaluating step {state.step} on the validation text"):
            nats = validation_nats(self.model, self.validation, self.config.context, micro, self.rank, self.world_size)
            unused_after(self.model)
        nats = self._all_reduce(nats)
        loss = float(nats) / (self.validation.num_targets)
        if not math.isfinite(loss):
            raise diverged(f"validation loss is {loss}", state.step)
        best = loss < state.best_loss and not untrained
        if not untrained:
            state.last_evaluated, state.last_loss = state.step, loss
            state.since_best = 0 if best else state.since_best + 1
        if best:
            state.best_loss, state.best_step = loss, state.step
        return Evaluation(
            state.step,
            state.step * self.tokens_per_step,
            state.step / self.batches.steps_per_epoch,
            loss,
            self._bits_per_byte(loss),
            best,
            time.perf_counter() - start,
            self.trained_seconds,
        )

    # --- the hot path -------------------------------------------------------------------------------------------

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's part of the mean loss, and the gradient norm."""
        batch = self.batches.batch(step, self.rank, self.world_size)  # tokens, targets, perhaps positions, (b, T) each
        if self.device.type == "cuda":
            batch = tuple(part.pin_memory() for part in batch)  # so that copying them does not wait for the device
        if self.model.config.dropout or self.config.lora_dropout:
            torch.manual_seed(((self.config.seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**63)
        share = math.ceil(self.config.batch_size / self.world_size)
        size = self.config.micro_batch_size or share
        scale = self.world_size / self.batches.targets(step)  # gradients are averaged over ranks, so each multiplies
        total = torch.zeros((), device=self.device)
        rows = len(batch[0])
        if self.sharded and rows <= (math.ceil(share / size) - 1) * size:  # all ranks make as many passes
            batch, rows = with_idle_row(batch), rows + 1
        for start in range(0, rows, size):
            parts = (part[start : start + size].to(self.device, non_blocking=True) for part in batch)
            with self._sync(start + size >= rows), self.autocast():
                loss = self.runner(*parts) * scale
                loss.backward()
            total += loss.detach()
        if self.sharded:
            average_vectors(self.parameters.values())
        norm = clip_gradients(self.parameters.values(), self.config.grad_clip or math.inf)
        self.optimizers.step(learning_rate_factor(self.config, step, self.total_steps))
        return total, norm

    def autocast(self):
        """The context of every forward pass: bf16 products, or none in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sync(self, last: bool):
        """DDP syncs gradients on a step's last micro-batch only; FSDP always, so that no rank holds whole ones."""
        return contextlib.nullcontext() if last or self.runner is self.model else self.runner.no_sync()

    # --- between steps ------------------------------------------------------------------------------------------

    def _event_due(self, step: int) -> bool:
        intervals = (self.log_every, self.eval_every, self.save_every)
        return step >= self.total_steps or any(step % interval == 0 for interval in intervals)

    def _sync_ranks(self, losses: list[Tensor], norms: list[Tensor], elapsed: float) -> tuple[list[float], float, str]:
        """Reduces over ranks: mean losses, the last gradient norm, and why to stop, or an empty string."""
        asked = 0.0
        if self.rank == 0:
            minutes = self.config.max_minutes
            asked = 2.0 if self.stop_asked() else 1.0 if minutes is not None and elapsed >= 60 * minutes else 0.0
        flag = torch.tensor([asked * self.world_size], device=self.device)
        agreed = (self._all_reduce(torch.cat([torch.stack(losses), torch.stack(norms).float(), flag]))).tolist()
        means, norm_list, code = (
            [v / self.world_size for v in part]
            for part in (agreed[: len(losses)], agreed[len(losses) : -1], agreed[-1:])
        )
        for i, (loss, norm) in enumerate(zip(means, norm_list, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                raise diverged(what, self.state.step - len(losses) + i + 1)
        return means, norm_list[-1], {0: "", 1: "max_minutes", 2: "stopped"}[round(code[0])]

    def _all_reduce(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def _progress(self, loss: float, norm: float, steps: int, seconds: float) -> Progress:
        step, rate = self.state.step, steps * self.tokens_per_step / seconds
        peak = peak_flops(self.device)
        flops = self.model.flops_per_token(self.config.context)
        left = (self.total_steps - step) * seconds / steps
        if self.config.max_minutes is not None:
            left = min(left, max(0.0, 60 * self.config.max_minutes - self.state.elapsed))
        return Progress(
            step,
            step * self.tokens_per_step,
            step / self.batches.steps_per_epoch,
            loss,
            loss * self.train.num_targets / self.train.num_bytes / math.log(2),
            norm,
            self.config.learning_rate * learning_rate_factor(self.config, step - 1, self.total_steps),
            rate,
            rate * flops / (peak * self.world_size) if peak else None,
            left,
            self.total_steps if self.total_steps < UNBOUNDED else None,
            self.batches.answered(range(step - steps, step)),
        )

    def _evaluation_due(self, reason: str) -> bool:
        """Whether this step needs an evaluation: at intervals, and when a limit ends the run."""
        step = self.state.step
        due = bool(reason) or step % self.eval_every == 0
        return due and reason != "stopped" and self.state.last_evaluated != step

    def _limit_reached(self) -> str:
        """The limit or goal already reached, or an empty string: a resumed run may have no steps left."""
        if self.state.step >= self.total_steps:
            return self.limit
        minutes = self.config.max_minutes
        return "max_minutes" if minutes is not None and self.state.elapsed >= 60 * minutes else self._goal_reached()

    def _goal_reached(self) -> str:
        """The target reached so far, `patience`, or an empty string."""
        for status in self._target_statuses():
            if status.reached:
                return status.target
        patience = self.config.patience
        return "patience" if patience is not None and self.state.since_best >= patience else ""

    def _target_statuses(self) -> tuple[TargetStatus, ...]:
        best = self.state.best_loss
        return target_statuses(
            self.config,
            target_loss=best,
            target_bits_per_byte=self._bits_per_byte(best),
            target_train_loss=self.state.best_train_loss,
        )

    def _bits_per_byte(self, loss: float) -> float:
        """Converts a validation loss from nats per token to bits per UTF-8 byte."""
        return loss * (self.validation.num_targets) / math.log(2) / self.validation.num_bytes


def with_idle_row(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch with one more row, without targets."""
    x, y, *more = batch
    idle = torch.full_like(y[:1], IGNORE)
    return torch.cat([x, x[:1]]), torch.cat([y, idle]), *(torch.cat([part, part[:1]]) for part in more)


def diverged(what: str, step: int) -> TrainingError:
    """The error for a loss or gradient norm that is not finite."""
    return TrainingError(
        f"the {what} at step {step}; the last good checkpoint is kept. "
        "Try a lower learning rate, more warm-up steps or --precision fp32"
    )
