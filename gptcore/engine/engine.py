"""The engine: each call of `step` schedules, runs the model and postprocesses.

It belongs to one thread. The scheduler owns the queue, the cache the slots, the runner the keys and values, and the
engine the sampling and text of each request.
"""

import secrets
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptcore.engine.cache import SlotCache
from gptcore.engine.continuation import Continuation
from gptcore.engine.interface import (
    Chunk,
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    Runner,
    TokenLogprob,
    Update,
    validate,
)
from gptcore.engine.runners import make_runner
from gptcore.engine.sampler import SampledToken, describe, sample, token_logprobs
from gptcore.engine.scheduler import ScheduledStep, Scheduler
from gptcore.engine.sequence import Phase, Sequence
from gptcore.engine.settings import EngineSettings
from gptcore.engine.speculation import Speculation
from gptcore.errors import ConfigError, EngineError
from gptcore.package import Package
from gptcore.sampling import SamplingParams, SamplingState


@dataclass
class ActiveRequest:
    """An open request: its sequence, its sampling state, and the text that it generates."""

    sequence: Sequence
    row: SamplingState
    continuation: Continuation
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Those not yet returned in an update."""

    def rows(self) -> list[SamplingState]:
        """The states for sampling the next token, and the one after each token of the draft, as if that were right."""
        row, rows, tokens = self.row, [self.row], self.row.tokens
        for token in self.sequence.draft:
            tokens = [*tokens, token]
            rows.append(SamplingState(row.params, row.seed, tokens, row.prompt_length))
        return rows


class Engine:
    """A model, a cache with a fixed number of slots, and the open requests."""

    def __init__(
        self, package: Package, settings: EngineSettings = EngineSettings(), runner: Runner | None = None
    ) -> None:
        """Load the model unless `runner` is given. Raises ConfigError or PackageError."""
        self.package = package
        self.settings = settings
        self.runner = runner or make_runner(package, settings)
        cache = SlotCache(
            self.runner.slots,
            self.runner.context_length,
            self.runner.invariant,
            self.runner.reuse_granularity,
            settings.prefix_cache,
        )
        exact = self.runner.invariant and self.runner.reuse_granularity == 1  # drafts run in chunks of any length
        speculation = Speculation.on(self.runner.name, self.runner.weights) if settings.speculation and exact else None
        self._scheduler = Scheduler(cache, settings.prefill_tokens, settings.max_queue, speculation)
        self._vocab_size = package.tokenizer.vocab_size
        self._active: dict[str, ActiveRequest] = {}
        self._aborted: list[str] = []
        self._reused = self._prompts = self._generated = self._steps = self._drafted = self._accepted = 0

    @property
    def info(self) -> EngineInfo:
        """Runner, precision, slots and memory."""
        r = self.runner
        dtype = str(r.dtype).removeprefix("torch.")
        return EngineInfo(
            runner=r.name,
            note=r.note,
            dtype=dtype,
            device=str(r.device),
            slots=r.slots,
            context_length=r.context_length,
            cache_bytes=r.cache_bytes,
            invariant=r.invariant,
            weights=r.weights,
        )

    @property
    def alive(self) -> bool:
        """Always true: it has no process of its own that could end."""
        return True

    @property
    def busy(self) -> bool:
        """Whether there are open requests."""
        return bool(self._active)

    def encode(self, text: str) -> tuple[int, ...]:
        """The prompt for `text`, with the tokenizer's `bos`. To begin a document, use its `encode_prompt("")`."""
        tokenizer = self.package.tokenizer
        return (*tokenizer.bos, *tokenizer.encode(text))

    def validate(self, request: Request) -> None:
        """Raises ConfigError for a request that this model cannot run. May be called from any thread."""
        context = self.runner.context_length
        validate(request, context, context if request.prompt_only else context - 1, self._vocab_size)

    def add(self, request: Request) -> None:
        """Add `request` to the queue. Raises ConfigError if it is invalid, QueueFull if the queue is full."""
        self.validate(request)
        if request.request_id in self._active:
            raise ConfigError(f"request id {request.request_id!r} is in use", param="request_id")
        params = request.params
        sequence = Sequence(request, time.monotonic())
        self._scheduler.add(sequence)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._active[request.request_id] = ActiveRequest(
            sequence,
            SamplingState(params, seed, sequence.tokens, sequence.prompt_length),
            Continuation(request, self.package.tokenizer, self.runner.context_length),
        )

    def abort(self, request_id: str) -> None:
        """End a request at the next step, which returns its last update. An unknown id is ignored."""
        if request_id in self._active:
            self._aborted.append(request_id)

    def abort_all(self) -> None:
        """End every open request at the next step."""
        self._aborted += self._active

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Run one step; return at most one update per request."""
        updates = self._end_aborted()
        step = self._scheduler.schedule(time.monotonic())
        if step.work:
            chunks = [self._chunk(sequence, count) for sequence, count in step.work]
            for source, target, length in step.copies:
                self.runner.copy(source, target, length)
            logits = self.runner.forward(chunks)  # (sum of wanted, V)
            updates += self._postprocess(step, chunks, logits)
            self._steps += 1
        return updates

    def stats(self) -> EngineStats:
        """The current counters. May be called from any thread."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=len(scheduler.waiting),
            slots=self.runner.slots,
            slots_used=self.runner.slots - scheduler.cache.free,
            cached_tokens_reused_total=self._reused,
            prompt_tokens_total=self._prompts,
            generated_tokens_total=self._generated,
            steps_total=self._steps,
            draft_tokens_total=self._drafted,
            accepted_tokens_total=self._accepted,
        )

    def check(self) -> None:
        """Raises EngineError unless requests, queues and slots are consistent."""
        self._scheduler.check()
        known = {s.id for queue in self._scheduler.queues.values() for s in queue}
        if known != self._active.keys():
            raise EngineError(f"these are open or at work, but not both: {sorted(known ^ self._active.keys())}")

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the model once for prefill and decoding, so that the first request is not slow.

        Raises EngineError if requests are open, or if the model's logits are not finite.
        """
        if self.busy:
            raise EngineError("requests are open; warm up the engine before adding requests")
        eot = self.package.tokenizer.eot
        room = self.runner.context_length
        prompt = [eot] * max(1, min(self._scheduler.prefill_tokens, room - 1))
        logits = self.runner.forward([Chunk(0, 0, prompt, 1)])  # (1, V)
        if len(prompt) < room:
            logits = self.runner.forward([Chunk(0, len(prompt), [eot], 1)])
        if not logits[:, : self._vocab_size].isfinite().all():
            raise EngineError(f"the logits of the model in {self.package.path} are not finite")
        row = SamplingState(SamplingParams(), 0, prompt, len(prompt))
        sample(logits, [row], self._vocab_size, self.runner.next_tokens)

    def close(self) -> None:
        """Free the model and the cache; the engine cannot be used afterwards."""
        self.runner.close()

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start, end = sequence.computed, sequence.computed + count
        if sequence.phase is Phase.DECODE:
            return Chunk(sequence.slot, start, [sequence.tokens[-1], *sequence.draft], count)
        wanted = 1 if end == len(sequence.tokens) else 0
        if sequence.request.prompt_logprobs:
            wanted = count
        if start == sequence.cached:
            self._prompts += sequence.prompt_length
            self._reused += sequence.cached
        return Chunk(sequence.slot, start, sequence.tokens[start:end], wanted)

    def _postprocess(self, step: ScheduledStep, chunks: list[Chunk], logits: Tensor) -> list[Update]:
        """Sample the next token of each sequence whose tokens have all been run, and more while its draft is right.

        A request with `prompt_only` ends when its prompt has been run.
        """
        ready: list[ActiveRequest] = []
        scored: list[ActiveRequest] = []
        picked: list[int] = []
        row = 0
        for (sequence, count), chunk in zip(step.work, chunks, strict=True):
            active = self._active[sequence.id]
            if chunk.wanted > 0 and sequence.phase is Phase.PREFILL and sequence.request.prompt_logprobs:
                self._score_prompt(active, chunk, logits[row : row + chunk.wanted])
            row += chunk.wanted
            if not self._scheduler.advance(sequence, count):
                continue
            if sequence.request.prompt_only:
                scored.append(active)
            else:
                ready.append(active)
                picked += range(row - 1 - len(sequence.draft), row) if sequence.draft else (row - 1,)
        updates = [self._update(active, "", (), (), FinishReason.LENGTH) for active in scored]
        if not ready:
            return updates
        if len(picked) < row:
            logits = logits[picked]
        rows: list[SamplingState] = []
        for active in ready:
            rows += active.rows() if active.sequence.draft else (active.row,)
        choices, at = sample(logits, rows, self._vocab_size, self.runner.next_tokens), 0
        for active in ready:
            end = at + 1 + len(active.sequence.draft)
            updates.append(self._follow(active, choices[at:end]))
            at = end
        return updates

    def _follow(self, active: ActiveRequest, choices: list[SampledToken]) -> Update:
        """Append sampled tokens to the sequence while its draft is right, and end it if it is complete.

        A choice is what would have been sampled if the draft before it is right. The first that differs from the draft
        is the last that counts.
        """
        sequence, draft = active.sequence, active.sequence.draft
        token, kept = choices[0].token, 1
        text, reason = active.continuation.add(token)
        sequence.tokens.append(token)
        while draft and reason is None and kept <= len(draft) and token == draft[kept - 1]:
            token = choices[kept].token
            more, reason = active.continuation.add(token)
            sequence.tokens.append(token)
            text += more
            kept += 1
        if draft:
            sequence.accept(kept - 1)
            self._drafted += len(draft)
            self._accepted += kept - 1
        self._generated += kept
        logprobs: tuple[TokenLogprob, ...] = ()
        if active.row.params.logprobs is not None:
            logprobs = tuple(describe(choice, self.package.tokenizer, generated=True) for choice in choices[:kept])
        tokens = (token,) if kept == 1 else tuple(sequence.tokens[-kept:])
        return self._update(active, text, tokens, logprobs, reason, len(draft), kept - 1)

    def _update(
        self,
        active: ActiveRequest,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        drafted: int = 0,
        accepted: int = 0,
    ) -> Update:
        sequence = active.sequence
        if reason is not None:
            self._scheduler.finish(sequence)
            del self._active[sequence.id]
        prompt_logprobs, active.prompt_logprobs = tuple(active.prompt_logprobs), []
        return Update(
            sequence.id,
            text,
            token_ids,
            logprobs,
            reason,
            sequence.prompt_length,
            sequence.generated,
            sequence.cached,
            prompt_logprobs,
            sequence.admitted - sequence.arrived,
            drafted,
            accepted,
        )

    def _end_aborted(self) -> list[Update]:
        aborted, self._aborted = dict.fromkeys(self._aborted), []
        return [self._abort(self._active[name]) for name in aborted if name in self._active]

    def _abort(self, active: ActiveRequest) -> Update:
        if active.sequence.phase is Phase.WAITING:
            active.sequence.admitted = time.monotonic()  # for queue_seconds
        return self._update(active, active.continuation.flush(), (), (), FinishReason.ABORT)

    def _score_prompt(self, active: ActiveRequest, chunk: Chunk, logits: Tensor) -> None:
        """Record the logprobs of the prompt tokens that follow those of `chunk`; logits are (T, V)."""
        tokenizer = self.package.tokenizer
        prompt, top = active.sequence.request.prompt, active.row.params.logprobs or 0
        following = prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.tokens)]
        if chunk.start == 0:
            active.prompt_logprobs.append(describe(SampledToken(prompt[0]), tokenizer))
        scored = token_logprobs(logits[: len(following)], following, top, self._vocab_size)
        active.prompt_logprobs += [describe(choice, tokenizer) for choice in scored]
