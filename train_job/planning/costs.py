"""Memory and time of a training step and of a served request.

In: shapes, a `Device`, `Rates`, a number of GPUs. Out: estimates, from formulas that docs/scaling.md explains. Tests
compare them with real steps: bytes with what autograd saves, seconds with runs.
"""

import bisect
import math
from dataclasses import dataclass

import torch

from gptcore.config import ModelConfig
from gptcore.engine.settings import UTILISATION, target_ongoing_requests
from gptcore.loss import SOFTMAX_ROWS, chunk_rows
from gptcore.model import GPT
from train_job.config import MOST_TOKENS, TrainConfig
from train_job.training.devices import Device, Rates

_PLAIN = ("qwen2", "llama", "mistral")
"""The rotary families without QK-norm."""
FEATURE_BYTES = {"qwen3": 850, "gpt2": 225, **dict.fromkeys(_PLAIN, 568)}
"""Read and written outside matrix products, forward and backward, per token, block and feature of the residual stream,
bf16 under autocast, not compiled."""
SCORE_BYTES = 20
"""The same per head and attended position, for unfused attention: on a CPU, up to 512 tokens."""
LOGIT_BYTES = 45
"""The same for the loss, per token and row of the vocabulary."""
COMPILED_FEATURE_BYTES, COMPILED_LOGIT_BYTES = 120, 12
"""The same after fusion; assumed."""
SAVED_BYTES = {"qwen3": (50, 8, 12, 8, 8), "gpt2": (24, 4, 4, 16, 4), **dict.fromkeys(_PLAIN, (34, 8, 4, 8, 8))}
"""Bytes that autograd saves for backward, per token. In a block: per feature, per MLP feature, per head, and constant.
Outside the blocks: per feature."""
LOSS_BYTES = 8
"""Peak bytes of a softmax, per token and row of the vocabulary: logits in fp32, and their softmax."""
GPU_RESERVE = 1.5e9
"""Bytes: CUDA's context, NCCL's buffers, libraries' workspaces."""
FRAGMENTATION = 1.1
BUCKET = 25 * 2**20
"""Bytes of gradients in one DDP bucket."""
BUCKET_LATENCY = 20e-6
"""Seconds per bucket, for each doubling of the number of GPUs."""
LINK_SHARE = 0.8
"""Share of a link's peak that an all-reduce reaches."""
SERVICE_SHARE = 0.95
"""Share of the engine's tokens/s that the service delivers (bench/serve.py)."""
REQUEST_SECONDS = 1 / 620
"""Fixed cost of a request: Ray Serve's maximum rate on two cores."""
STEP_SECONDS, TOKEN_SECONDS = 30e-6, 10e-6
"""Time of the engine's Python per step and per token, measured with a network that takes no time."""
KERNELS = {"qwen3": 180, "gpt2": 75, **dict.fromkeys(_PLAIN, 120)}
"""Kernels per block and micro-batch, forward and backward, not compiled; a quarter of them when compiled."""
DECODE_KERNELS = 12
"""Kernels per block of a decoding step."""
LAUNCH_SECONDS = 5e-6
"""Time from one kernel to the next when the GPU waits for Python; assumed."""


@dataclass(frozen=True)
class Workload:
    """The parameters, products and bytes of a model."""

    model: ModelConfig
    length: int
    """Tokens per sequence."""
    parameters: int
    matrices: tuple[tuple[int, int], ...]
    """Shapes of the blocks' weight matrices, which Muon trains."""
    outside: int
    """Weights of the embeddings and the head."""
    flops_per_token: int
    """FLOP per token of a training step, forward and backward."""

    @property
    def inside(self) -> int:
        """Weights of the blocks' matrices."""
        return sum(a * b for a, b in self.matrices)

    def per_worker(self, sharded_over: int) -> float:
        """Parameters of a worker if matrices are divided among so many; vectors stay whole."""
        matrices = self.inside + self.outside
        return matrices / sharded_over + self.parameters - matrices

    @property
    def decode_flops(self) -> float:
        """FLOP per generated token: two per weight in a product."""
        return 2 * self.read_weights

    @property
    def read_weights(self) -> int:
        """Weights that a decoding step reads: the blocks' matrices and the output head."""
        return sum(a * b for a, b in self.matrices) + self.model.vocab_size * self.model.hidden_size

    @property
    def cache_bytes(self) -> int:
        """Keys and values per token, in bf16."""
        return 2 * 2 * self.model.num_layers * self.model.kv_heads * self.model.head_size


def workload(model: ModelConfig, length: int) -> Workload:
    """Counts them on a network without weights."""
    with torch.device("meta"):
        network = GPT(model)
    shapes = {n: (p.size(0), p.size(1)) for n, p in network.named_parameters() if p.ndim == 2}
    matrices = tuple(shape for n, shape in shapes.items() if "layers." in n)
    outside = sum(a * b for n, (a, b) in shapes.items() if "layers." not in n)
    return Workload(model, length, network.num_parameters(), matrices, outside, network.flops_per_token(length))


# --- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Peak bytes on each GPU during a step."""

    weights: float
    gradients: float
    buckets: float
    """DDP's copies of the gradients."""
    optimizer: float
    gathered: float
    """FSDP: whole weights that are in use, and whole gradients before they are divided."""
    exchange: float
    """What the end of a step takes beyond activations and loss, which are freed by then: Muon's whole matrices, or with
    FSDP the gradients of embeddings and head."""
    activations: float
    loss: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def training_memory(config: TrainConfig, work: Workload, workers: int, sequences: int | None = None) -> Memory:
    """Memory of a worker that processes `sequences` at once, by default the config's micro-batch.

    An upper bound if the model is compiled or has fewer key/value heads than heads.
    """
    micro = (sequences or micro_batch(config, workers)) * work.length  # tokens
    parts = sharded_over(config, workers)
    held = work.per_worker(parts)
    muon = work.inside / parts if config.optimizer == "muon" else 0
    vocabulary, width = work.model.vocab_size, work.model.hidden_size
    casts = 2 * (work.read_weights if parts == 1 else vocabulary * width)  # autocast's bf16 weights
    logits = (2 * min(micro, chunk_rows(width)) + LOSS_BYTES * min(micro, SOFTMAX_ROWS)) * vocabulary
    if config.checkpoint_activations:  # no block is recomputed while there are logits
        logits = max(0, logits - micro * block_saved_bytes(work.model))
    activations = FRAGMENTATION * (micro * saved_bytes(work.model, config.checkpoint_activations) + casts)
    # Between forward and backward, the loss also holds the gradients of its input and of the head.
    loss = FRAGMENTATION * (logits + 4 * micro * width + 6 * vocabulary * width)
    return Memory(
        weights=4 * held,
        gradients=4 * held,
        # With bf16, also copies of those on their way.
        buckets=(6 if config.reduce_precision == "bf16" else 4) * work.parameters if workers > parts else 0,
        optimizer=4 * muon + 8 * (held - muon),
        gathered=gathered_bytes(config, work) if parts > 1 else 0,
        exchange=max(0.0, exchange_bytes(config, work, workers) - activations - loss),
        activations=activations,
        loss=loss,
        reserve=GPU_RESERVE,
    )


def sharded_over(config: TrainConfig, workers: int) -> int:
    """The workers that divide the model among them; 1 if each has all of it."""
    return workers if config.parallel == "fsdp" else 1


def reduced_bytes(config: TrainConfig) -> int:
    """Bytes of a gradient's element on its way between workers."""
    return 2 if config.reduce_precision == "bf16" else 4


def gathered_bytes(config: TrainConfig, work: Workload) -> float:
    """FSDP: embeddings and head in fp32; bf16 weights of the block in use and of the next; gradients of a block.

    These are whole, and once more in the precision in which they are sent, as are those of the block before.
    """
    block = work.inside / work.model.num_layers
    return 4 * work.outside + (2 * 2 + 2 + 2 * reduced_bytes(config)) * block


def exchange_bytes(config: TrainConfig, work: Workload, workers: int) -> float:
    """The most that gradients of embeddings and head (FSDP), or Muon's round of one matrix a worker, take in a step."""
    parts = sharded_over(config, workers)
    ends = (4 + reduced_bytes(config)) * work.outside if parts > 1 else 0
    if config.optimizer != "muon" or workers == 1:
        return ends
    first = sorted((a * b for a, b in work.matrices), reverse=True)[:workers]
    # In bf16, and their results: under DDP all matrices of a round; under FSDP this worker's rows, and one matrix with
    # its products.
    return max(ends, 4 * sum(first) / parts + (8 * first[0] if parts > 1 else 0))


def saved_bytes(model: ModelConfig, checkpointed: bool = False) -> int:
    """Bytes that autograd saves per token, without the loss; with activation checkpointing, at the peak of backward."""
    blocks = model.num_layers * block_saved_bytes(model)
    if checkpointed:
        blocks = model.num_layers * 4 * model.hidden_size + block_saved_bytes(model)
    return blocks + SAVED_BYTES[model.family][-1] * model.hidden_size


def block_saved_bytes(model: ModelConfig) -> int:
    """Bytes that autograd saves per token of one block."""
    feature, inner, head, fixed, _ = SAVED_BYTES[model.family]
    return feature * model.hidden_size + inner * (model.intermediate_size or 0) + head * model.num_heads + fixed


def micro_batch(config: TrainConfig, workers: int) -> int:
    """Sequences that a worker processes at once."""
    share = math.ceil(config.batch_size / workers)
    return min(config.micro_batch_size or share, share)


def largest_micro_batch(config: TrainConfig, work: Workload, workers: int, device: Device) -> int:
    """The most sequences that fit the memory at once; 0 if not even one fits."""

    def too_large(sequences: int) -> bool:
        return training_memory(config, work, workers, sequences).total > device.memory

    return bisect.bisect_left(range(1, MOST_TOKENS // work.length), True, key=too_large)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on the worker with the most sequences."""

    products: float
    elementwise: float
    softmax: float
    optimizer: float
    launching: float
    """Time the GPU waits for Python, if the micro-batch is too small."""
    gradients: float
    """Time in which gradients, and with FSDP weights, are sent, hidden or not."""
    waiting: float
    """The part of it that computing does not hide."""

    @property
    def seconds(self) -> float:
        return self.products + self.elementwise + self.softmax + self.optimizer + self.launching + self.waiting


def training_step(config: TrainConfig, work: Workload, device: Device, rates: Rates, workers: int) -> Step:
    """Compute time, then the part of sending gradients and weights that computing does not hide."""
    model, fused = work.model, config.compile and device.name != "cpu"
    rows = math.ceil(config.batch_size / workers)
    tokens = rows * work.length
    passed = 4 / 3 if config.checkpoint_activations else 1.0  # blocks go forward twice
    head = 6 * model.vocab_size * model.hidden_size
    products = tokens * (head + passed * (work.flops_per_token - head)) / rates.products
    moved = model.num_layers * block_bytes(model, work.length, device.name, fused)
    elementwise = tokens * passed * moved / rates.elementwise
    softmax = tokens * model.vocab_size * (COMPILED_LOGIT_BYTES if fused else LOGIT_BYTES) / rates.softmax
    passes = math.ceil(rows / micro_batch(config, workers))
    launched = passes * model.num_layers * KERNELS[model.family] * LAUNCH_SECONDS / (4 if fused else 1)
    computing = products + elementwise + softmax
    launching = max(0.0, launched - computing) if device.name != "cpu" else 0.0
    backward = (computing + launching) / passes * (3 / 4 if config.checkpoint_activations else 2 / 3)
    if sharded_over(config, workers) == 1:  # only the last micro-batch's backward runs beside the all-reduce
        whole = all_reduce_seconds(4 * work.parameters, device, workers)
        gradients, last = (reduced_bytes(config) / 4 * seconds for seconds in whole)
        waiting = max(gradients - backward, last)
    else:
        forward = (computing + launching) / passes - backward
        gradients, waiting = (passes * t for t in sharded_seconds(config, work, device, workers, forward, backward))
    optimizer = optimizer_seconds(config, work, rates, device, workers)
    return Step(products, elementwise, softmax, optimizer, launching, gradients, waiting)


def block_bytes(model: ModelConfig, length: int, device: str, fused: bool = False) -> int:
    """Bytes read and written outside matrix products, per token and block."""
    scores = SCORE_BYTES * model.num_heads * length if device == "cpu" and length <= 512 else 0
    return model.hidden_size * (COMPILED_FEATURE_BYTES if fused else FEATURE_BYTES[model.family]) + scores


def link_speed(device: Device, workers: int) -> float:
    """Bytes/s between workers that send around a ring, over its slowest link."""
    return LINK_SHARE * (device.link if workers <= device.per_machine else min(device.link, device.network))


def all_reduce_seconds(size: float, device: Device, workers: int) -> tuple[float, float]:
    """Seconds of a ring all-reduce of `size` bytes, and of its last bucket, which nothing hides."""
    if workers == 1:
        return 0.0, 0.0
    ring = 2 * (workers - 1) / workers / link_speed(device, workers)
    latency = BUCKET_LATENCY * math.log2(workers)
    return size * ring + math.ceil(size / BUCKET) * latency, min(size, BUCKET) * ring + latency


def sharded_seconds(
    config: TrainConfig, work: Workload, device: Device, workers: int, forward: float, backward: float
) -> tuple[float, float]:
    """Seconds in which FSDP sends weights and gradients of one micro-batch, and those that computing does not hide.

    Blocks' weights are gathered in bf16, for forward and again for backward, and their gradients scattered. Nothing
    hides embeddings and head: they are gathered in fp32 before the first block, and scattered after the last.
    """
    reduced = reduced_bytes(config)
    ring = (workers - 1) / workers / link_speed(device, workers)
    latency = work.model.num_layers * BUCKET_LATENCY * math.log2(workers)
    gather, scatter = 2 * work.inside * ring + latency, reduced * work.inside * ring + latency
    ends = (4 + reduced) * work.outside * ring
    return 2 * gather + scatter + ends, max(0.0, gather - forward) + max(0.0, gather + scatter - backward) + ends


def optimizer_seconds(config: TrainConfig, work: Workload, rates: Rates, device: Device, workers: int) -> float:
    """AdamW reads and writes 28 bytes per parameter of this worker, Muon 20; its products are dealt out to workers.

    Matrices are sorted by their work and dealt out in rounds; a round takes as long as its largest. Then the workers
    exchange results in bf16: DDP sends each to all, FSDP sends rows to the worker that needs the whole, and back.
    """
    parts = sharded_over(config, workers)
    held, moved = work.per_worker(parts), work.inside / parts
    if config.optimizer == "adamw":
        return 28 * held / rates.elementwise
    largest = sorted(map(newton_schulz_flops, work.matrices), reverse=True)[::workers]
    sent = 2 * work.inside * (workers - 1) / workers * (2 / workers if parts > 1 else 1)
    exchanged = sent / link_speed(device, workers)
    return sum(largest) / rates.products + exchanged + (28 * (held - moved) + 20 * moved) / rates.elementwise


def newton_schulz_flops(shape: tuple[int, int]) -> int:
    """Floating-point operations of Muon's four rounds on a matrix."""
    short, long = sorted(shape)
    return 4 * (4 * short**2 * long + 2 * short**3)


# --- serving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """The speed of one replica with full slots and requests of one size, and the replicas that a load needs."""

    load: float
    """Requests per second."""
    prompt_tokens: int
    new_tokens: int
    slots: int
    first_token_seconds: float
    """On an idle replica, without the service's own milliseconds."""
    step_seconds: float
    """One more token for every slot."""
    requests_per_second: float
    """The most that one replica completes."""
    replicas: int
    target_ongoing_requests: float
    """Requests per replica that autoscaling should aim for."""
    dollars_per_million: float | None
    """The price of a million new tokens at this load; None without a price."""


def serving(
    work: Workload,
    device: Device,
    rates: Rates,
    slots: int,
    prompt_tokens: int,
    new_tokens: int,
    requests_per_second: float,
) -> Serving:
    """The replicas for a load; prompts and new tokens share a replica's time."""
    prompt = prompt_tokens * work.decode_flops / rates.prefill_products
    step = decode_seconds(work, device, rates, slots, prompt_tokens + new_tokens / 2)
    most = 1 / (REQUEST_SECONDS + (prompt + new_tokens * step / slots) / SERVICE_SHARE)
    replicas = math.ceil(requests_per_second / (UTILISATION * most))
    millions = 3600 * requests_per_second * new_tokens / 1e6  # new tokens per hour
    return Serving(
        requests_per_second,
        prompt_tokens,
        new_tokens,
        slots,
        prompt + decode_seconds(work, device, rates, 1, prompt_tokens),
        step,
        most,
        replicas,
        target_ongoing_requests(slots),
        replicas * device.price / millions if device.price else None,
    )


def decode_seconds(work: Workload, device: Device, rates: Rates, sequences: int, context: float) -> float:
    """Seconds of one step: the weights are read once; each sequence adds products, cache reads and some Python."""
    read = 2 * work.read_weights / rates.decode_bandwidth
    each = work.decode_flops / rates.decode_products + context * work.cache_bytes / rates.decode_bandwidth
    launched = work.model.num_layers * DECODE_KERNELS * LAUNCH_SECONDS if device.name != "cpu" else 0.0
    return STEP_SECONDS + max(read + sequences * each, launched) + sequences * TOKEN_SECONDS
