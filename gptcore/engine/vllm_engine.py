"""vLLM behind the interface of our own engine, for models and GPUs that ours is not made for.

Takes the same `Request`s and returns the same `Update`s. vLLM schedules, runs the network and samples, in processes of
its own. Prompts go there as token ids, and tokens come back: text, stop strings and the end of a sequence are decided
here, by the code that our engine uses. vLLM is imported when an engine is made; `make .venv-vllm/installed` makes an
environment that has it.

vLLM's engine is asynchronous. A private event loop drives it, and runs only within `step`.
"""

import asyncio
import contextlib
import importlib.util
import logging
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gptcore.devices import pick_dtype
from gptcore.engine.continuation import Continuation
from gptcore.engine.interface import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    TokenLogprob,
    Update,
    merge,
    validate,
)
from gptcore.engine.runners import context_note, count_slots, fit_context, slot_bytes
from gptcore.engine.sampler import SampledToken, describe
from gptcore.engine.settings import EngineSettings
from gptcore.errors import ConfigError, EngineError, QueueFull
from gptcore.hf_format import count_parameters, published_config
from gptcore.memory import free_memory, require_memory
from gptcore.package import Package, save_package
from gptcore.sampling import MASK, SamplingParams

logger = logging.getLogger(__name__)

STEP_SECONDS = 0.02
"""How long a step waits for vLLM: a long prompt gives nothing for a while, and new requests should not wait for it."""
CPU_BLOCK = 32
"""Tokens in a block of the cache on a CPU. Only whole blocks are reused, and vLLM's kernels want multiples of 32."""
GPU_SLOTS = 64
HOTTEST = 2.0
"""vLLM's highest temperature."""
CAVEATS = (
    "seeds: a seed gives another text than with the engine foundry, and may give another text beside other requests",
    "temperature is at most 2, and between 0 and 0.01 it is 0.01",
    "min_p is applied before top_k and top_p",
    "a prompt that fills the context cannot be scored; one token less can",
)
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one core per thread is for a machine with nothing else to do
}
"""vLLM's variables, unless they are set."""


@dataclass
class OpenRequest:
    """A request that vLLM is working on."""

    request: Request
    continuation: Continuation
    arrived: float
    """When it came, in seconds of a monotonic clock."""
    reader: asyncio.Task[None] | None = None
    """Reads vLLM's outputs for it."""
    cached: int = 0
    queue_seconds: float = 0.0
    started: bool = False
    """Whether its first output has come."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Those not yet returned in an update."""


class VllmEngine:
    """A model in vLLM, and the open requests."""

    def __init__(self, package: Package, settings: EngineSettings, start: Callable[..., Any] | None = None) -> None:
        """Start vLLM's processes and load the model; `start` replaces `start_vllm` in tests.

        Raises ConfigError for a setting that vLLM does not have or if it is not installed, and NoMemory.
        """
        self.package = package
        self.settings = settings
        self._open: dict[str, OpenRequest] = {}
        self._aborted: list[str] = []
        self._outputs: list[tuple[OpenRequest, Any]] = []
        self._scheduled: Any = None
        self._reused = self._prompts = self._generated = self._steps = 0
        self._loop = asyncio.new_event_loop()
        self._arrived = asyncio.Event()
        try:
            here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            with _without_spare_rows(package, pick_dtype(settings.dtype, here)) as folder:
                self._llm, self._plan = self._run((start or start_vllm)(package, folder, settings, self._record))
        except BaseException:
            self._loop.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """Runner, precision, slots and memory."""
        return self._plan

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes are running."""
        return not self._llm.errored

    @property
    def busy(self) -> bool:
        """Whether there are open requests."""
        return bool(self._open)

    def validate(self, request: Request) -> None:
        """Raises ConfigError for a request that this model cannot run, or that vLLM refuses.

        vLLM always generates a token, so no prompt may fill the context.
        """
        context, tokenizer = self._plan.context_length, self.package.tokenizer
        validate(request, context, context - 1, tokenizer.vocab_size)
        if (temperature := request.params.temperature) > HOTTEST:
            raise ConfigError(f"temperature is {temperature:g}; with vLLM, at most {HOTTEST:g}", param="temperature")
        try:
            to_vllm(request, Continuation(request, tokenizer, context))
        except Exception as error:  # of vLLM's own type
            raise ConfigError(f"vLLM refuses the request: {error}", getattr(error, "parameter", None)) from error

    def add(self, request: Request) -> None:
        """Send `request` to vLLM. Raises ConfigError if it is invalid, QueueFull if the queue is full."""
        self.validate(request)
        if request.request_id in self._open:
            raise ConfigError(f"request id {request.request_id!r} is in use", param="request_id")
        if len(self._open) >= self._plan.slots + self.settings.max_queue:
            raise QueueFull(f"{len(self._open)} requests are open, which is as many as slots and queue hold")
        continuation = Continuation(request, self.package.tokenizer, self._plan.context_length)
        opened = OpenRequest(request, continuation, time.monotonic())
        self._open[request.request_id] = opened
        opened.reader = self._loop.create_task(self._read(opened))

    def abort(self, request_id: str) -> None:
        """End a request at the next step, which returns its last update. An unknown id is ignored."""
        if request_id in self._open:
            self._aborted.append(request_id)

    def abort_all(self) -> None:
        """End every open request at the next step."""
        self._aborted += self._open

    def step(self) -> list[Update]:
        """What has come from vLLM, merged into one update per request; waits a moment if there is nothing."""
        return self._run(self._step())

    def stats(self) -> EngineStats:
        """The current counters. May be called from any thread."""
        opened, scheduled = len(self._open), self._scheduled
        waiting = min(opened, scheduled.num_waiting_reqs) if scheduled else opened
        return EngineStats(
            running=opened - waiting,
            waiting=waiting,
            slots=self._plan.slots,
            slots_used=opened - waiting,
            cached_tokens_reused_total=self._reused,
            prompt_tokens_total=self._prompts,
            generated_tokens_total=self._generated,
            steps_total=self._steps,
        )

    def check(self) -> None:
        """Raises EngineError if vLLM has died."""
        if not self.alive:
            raise EngineError("vLLM's engine has died; the log says why")

    def warm_up(self) -> None:
        """Generate two tokens, so that the first request is not slow.

        Raises EngineError if requests are open, or if the model's logprobs are not finite.
        """
        if self.busy:
            raise EngineError("requests are open; warm up the engine before adding requests")
        room = self._plan.context_length - 1
        params = SamplingParams(max_new_tokens=2, top_k=2, logprobs=0, seed=0, ignore_eos=True)
        self.add(Request("warm-up", (self.package.tokenizer.eot,) * max(1, min(2, room)), params))
        updates: list[Update] = []
        while self.busy:
            updates += self.step()
        if updates[-1].finish_reason == FinishReason.ERROR:
            raise EngineError(f"vLLM cannot run the model in {self.package.path}")
        entries = [entry for update in updates for entry in update.logprobs]
        if not all(entry.logprob is not None and math.isfinite(entry.logprob) for entry in entries):
            raise EngineError(f"the logits of the model in {self.package.path} are not finite")
        self._reused = self._prompts = self._generated = self._steps = 0

    def close(self) -> None:
        """End vLLM's processes, which frees the model and the cache; the engine cannot be used afterwards."""

        async def end() -> None:
            for opened in list(self._open.values()):
                await self._drop(opened)
            self._llm.shutdown()  # ends its processes, or kills them after five seconds
            if others := asyncio.all_tasks() - {asyncio.current_task()}:  # vLLM's own
                for task in others:
                    task.cancel()
                await asyncio.wait(others)

        try:
            self._run(end())
        finally:
            self._loop.close()
            multiprocessing.active_children()  # reaps those that have ended

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def _record(self, scheduled: Any) -> None:
        """Called by vLLM after each step of its scheduler."""
        self._scheduled = scheduled
        self._steps += 1

    async def _read(self, opened: OpenRequest) -> None:
        """Collect vLLM's outputs for one request."""
        request = opened.request
        prompt = {"type": "token", "prompt_token_ids": list(request.prompt)}
        try:
            async for output in self._llm.generate(prompt, to_vllm(request, opened.continuation), request.request_id):
                self._outputs.append((opened, output))
                self._arrived.set()
        except Exception as error:
            self._outputs.append((opened, error))
            self._arrived.set()

    async def _step(self) -> list[Update]:
        updates = [await self._abort(self._open[name]) for name in dict.fromkeys(self._aborted) if name in self._open]
        self._aborted = []
        if not updates and self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), STEP_SECONDS)
            await asyncio.sleep(0)  # the other requests' outputs of the same step
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        for opened, output in outputs:
            if self._open.get(opened.request.request_id) is not opened:
                continue  # it has ended, and vLLM had already gone on
            if isinstance(output, Exception):
                updates.append(await self._fail(opened, output))
            else:
                updates.append(await self._follow(opened, output))
        together: dict[str, list[Update]] = {}
        for update in updates:
            together.setdefault(update.request_id, []).append(update)
        return [merge(several) for several in together.values()]

    async def _follow(self, opened: OpenRequest, output: Any) -> Update:
        """Take an output of vLLM, which has one or more new tokens, and end the sequence if it is complete."""
        request, completion, tokenizer = opened.request, output.outputs[0], self.package.tokenizer
        if not opened.started:
            self._begin(opened, output)
        if output.prompt_logprobs:
            scored = zip(request.prompt, output.prompt_logprobs, strict=True)
            top = request.params.logprobs or 0
            opened.prompt_logprobs += [describe(to_choice(token, known, top), tokenizer) for token, known in scored]
        if request.prompt_only:
            return await self._update(opened, "", (), (), FinishReason.LENGTH)
        text, tokens, entries, reason = "", [], [], None
        for index, token in enumerate(completion.token_ids):
            new, reason = opened.continuation.add(token)
            text += new
            tokens.append(token)
            if request.params.logprobs is not None:
                choice = to_choice(token, completion.logprobs[index], request.params.logprobs)
                entries.append(describe(choice, tokenizer, generated=True))
            if reason is not None:
                break
        self._generated += len(tokens)
        if reason is None and output.finished:  # it ended for a reason of its own
            reason, text = FinishReason.ERROR, text + opened.continuation.flush()
        return await self._update(opened, text, tuple(tokens), tuple(entries), reason)

    def _begin(self, opened: OpenRequest, output: Any) -> None:
        opened.started = True
        opened.cached = output.num_cached_tokens or 0
        if output.metrics is not None:
            opened.queue_seconds = max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts)
        self._prompts += len(opened.request.prompt)
        self._reused += opened.cached

    async def _abort(self, opened: OpenRequest) -> Update:
        if not opened.started:
            opened.queue_seconds = time.monotonic() - opened.arrived
        return await self._update(opened, opened.continuation.flush(), (), (), FinishReason.ABORT)

    async def _fail(self, opened: OpenRequest, error: Exception) -> Update:
        """The last update of a request that vLLM failed to run. Raises EngineError if vLLM has died."""
        if not self.alive:
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        logger.error("vLLM failed to run a request", exc_info=error)
        return await self._update(opened, opened.continuation.flush(), (), (), FinishReason.ERROR)

    async def _update(
        self,
        opened: OpenRequest,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
    ) -> Update:
        if reason is not None:
            await self._drop(opened)
        prompt_logprobs, opened.prompt_logprobs = tuple(opened.prompt_logprobs), []
        return Update(
            opened.request.request_id,
            text,
            token_ids,
            logprobs,
            reason,
            len(opened.request.prompt),
            opened.continuation.length,
            opened.cached,
            prompt_logprobs,
            opened.queue_seconds,
        )

    async def _drop(self, opened: OpenRequest) -> None:
        """Forget a request. If vLLM has not ended it, cancelling its reader makes vLLM do so."""
        del self._open[opened.request.request_id]
        if opened.reader is not None:
            opened.reader.cancel()
            await asyncio.wait((opened.reader,))


def to_vllm(request: Request, continuation: Continuation) -> Any:
    """vLLM's parameters for a request. Where the sequence ends is known to both, so that vLLM rarely runs on."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(**parameters(request, continuation), output_kind=RequestOutputKind.DELTA)


def parameters(request: Request, continuation: Continuation) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for a request."""
    params = request.params
    named = {
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": None if params.seed is None else params.seed & MASK >> 1,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
    }
    return {
        **named,
        "max_tokens": 1 if request.prompt_only else continuation.limit,
        "stop_token_ids": sorted(continuation.ends),
        "ignore_eos": True,  # the end-of-text token is among the stop tokens, if it ends the text
        "logprobs": params.logprobs,
        "prompt_logprobs": (params.logprobs or 0) if request.prompt_logprobs else None,
        "detokenize": False,
    }


def to_choice(token: int, known: Mapping[int, Any] | None, top: int) -> SampledToken:
    """A token with the logprobs that vLLM gives for its position: its own, and the likeliest with their ranks."""
    if known is None:  # the first token of a prompt
        return SampledToken(token)
    likeliest = sorted(known.items(), key=lambda item: item[1].rank)[:top]
    return SampledToken(token, known[token].logprob, tuple((other, entry.logprob) for other, entry in likeliest))


def require_vllm() -> None:
    """Raises ConfigError if vLLM is not installed here."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine is 'vllm', but this environment does not have vLLM; run the service from .venv-vllm, "
            "which `make .venv-vllm/installed` makes",
            param="engine",
        )


async def start_vllm(
    package: Package, folder: Path, settings: EngineSettings, record: Callable[[Any], None]
) -> tuple[Any, EngineInfo]:
    """Start vLLM with the package's model, whose files are in `folder`. Blocks its event loop meanwhile."""
    require_vllm()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    device = torch.device(current_platform.device_type)
    dtype, slots, arguments = engine_arguments(package, settings, device)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **arguments), stat_loggers=[Recorder])
    cache = llm.vllm_config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    context, whole = arguments["max_model_len"], package.config.context_length
    info = EngineInfo(
        runner=f"vLLM {vllm.__version__}",
        note=context_note(context, whole, settings),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type if settings.tensor_parallel == 1 else f"{settings.tensor_parallel} x {device.type}",
        slots=slots,
        context_length=context,
        cache_bytes=tokens * slot_bytes(package.config, dtype) // whole,
        invariant=False,
        caveats=CAVEATS,
    )
    return llm, info


def engine_arguments(
    package: Package, settings: EngineSettings, device: torch.device
) -> tuple[torch.dtype, int, dict[str, Any]]:
    """(precision, slots, the fields of vLLM's engine arguments). Raises ConfigError and NoMemory."""
    if settings.device not in ("auto", device.type):
        raise ConfigError(
            f"device is {settings.device!r}; expected auto or {device.type}, which this build of vLLM uses",
            param="device",
        )
    dtype = pick_dtype(settings.dtype, device)
    if settings.max_context or device.type == "cpu":  # on a GPU, vLLM's cache is shared by sequences of all lengths
        package = fit_context(package, settings, device, dtype)
    config = package.config
    published = published_config(config)
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # its own defaults, not those of the model's folder
        "hf_overrides": {name: published[name] for name in ("architectures", "tie_word_embeddings")},
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": config.context_length,
        "enable_prefix_caching": settings.prefix_cache,
        "tensor_parallel_size": settings.tensor_parallel,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if settings.tensor_parallel > 1:  # processes of this machine, not actors of Ray, which has reserved the GPUs
        arguments["distributed_executor_backend"] = "mp"
    if device.type == "cpu":
        needs = {"weights": count_parameters(config) * dtype.itemsize, "one slot": slot_bytes(config, dtype)}
        require_memory(f"the model in {package.path}", needs, free_memory(device))
        slots = count_slots(config, settings.slots, device, dtype, needs["weights"])
        blocks = slots * math.ceil(config.context_length / CPU_BLOCK) + 1  # vLLM keeps one for itself
        arguments |= {
            "block_size": CPU_BLOCK,
            "kv_cache_memory_bytes": blocks * CPU_BLOCK * slot_bytes(config, dtype) // config.context_length,
            "enforce_eager": not settings.compile,
            # A prompt in parts that is sampled with a seed ends vLLM 0.32 on a CPU: it rewinds the generator, and
            # torch's for CPUs cannot be rewound. So prompts are run whole there.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.context_length, settings.prefill_tokens) + slots,
        }
    else:  # vLLM compiles and captures CUDA graphs unless told otherwise, and is made to run like that
        slots = settings.slots or GPU_SLOTS
        arguments |= {
            "gpu_memory_utilization": settings.gpu_share,
            "max_num_batched_tokens": settings.prefill_tokens + slots,
        }
    return dtype, slots, arguments | {"max_num_seqs": slots}


def end_with_parent() -> None:
    """End this process when the one that started it has ended, be it by SIGKILL.

    vLLM calls this in each of its processes, as its plugin `gpt-foundry` (pyproject.toml). Otherwise its engine would
    outlive a replica that is killed, and keep the GPU's memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextlib.contextmanager
def _without_spare_rows(package: Package, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with the model for vLLM: the package's own, or a copy in `dtype`.

    Models that are trained here have rows of embedding behind the tokenizer's ids, which vLLM would sample. The copy is
    without them, has what quantised weights stand for, and is deleted when vLLM has read it.
    """
    config, tokenizer = package.config, package.tokenizer
    if config.vocab_size == tokenizer.vocab_size and not package.weights:
        yield package.path
        return
    state = dict(package.parameters(dtype=dtype))
    for name in {"embed_tokens.weight", "lm_head.weight"} & state.keys():
        state[name] = state[name][: tokenizer.vocab_size].contiguous()
    with tempfile.TemporaryDirectory(prefix="gpt-foundry-vllm-") as folder:
        path = Path(folder) / "model"
        save_package(path, replace(config, vocab_size=tokenizer.vocab_size), state, tokenizer, {})
        del state  # before vLLM takes memory for the same weights
        yield path
