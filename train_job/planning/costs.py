"""What a training step and a served request cost: memory, seconds, and what waits for what. A model one can check.

In: shapes, a `Device`, `Rates`, a number of GPUs. Out: figures, from sums that are written out here and explained in
docs/scaling.md. Tests hold them against real steps: bytes against what autograd keeps, seconds against runs.
"""

import math
from dataclasses import dataclass

import torch

from gptcore.config import ModelConfig
from gptcore.model import GPT
from train_job.config import TrainConfig
from train_job.training.devices import Device, Rates

FEATURE_BYTES = {"qwen3": 850, "gpt2": 225}
"""Read and written outside matrix products, forward and backward, per token, block and feature of the residual stream,
bf16 under autocast, not compiled."""
SCORE_BYTES = 20
"""The same per head and position that is attended to, where attention is plain: on a CPU, up to 512 tokens."""
LOGIT_BYTES = 46
"""The same for the loss, per token and row of the vocabulary."""
COMPILED_FEATURE_BYTES, COMPILED_LOGIT_BYTES = 120, 12
"""What fusion leaves of them; assumed."""
SAVED_BYTES = {"qwen3": (50, 8, 12, 8, 10), "gpt2": (24, 4, 4, 16, 6)}
"""What autograd keeps for backward per token: in a block, per feature, per feature of the MLP, per head, and in all;
outside the blocks, per feature."""
LOSS_BYTES = 10
"""The loss at its peak, per token and row of the vocabulary: logits twice, their softmax, their gradient."""
GPU_RESERVE = 1.5e9
"""Bytes: CUDA's context, NCCL's buffers, libraries' workspaces."""
FRAGMENTATION = 1.1
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once."""
BUCKET_LATENCY = 20e-6
"""Seconds per bucket and doubling of the number of GPUs."""
LINK_SHARE = 0.8
"""Of a link's peak, what an all-reduce gets."""
UTILISATION = 0.7
"""How busy replicas may be for waits to stay short."""
SERVICE_SHARE = 0.95
"""What the service keeps of its engine's tokens/s (bench/serve.py)."""
REQUEST_SECONDS = 1 / 620
"""What a request costs a replica whatever it asks for: Ray Serve's most on two cores."""
STEP_SECONDS, TOKEN_SECONDS = 30e-6, 10e-6
"""What the engine's Python takes per step and per token of it, measured on a network that takes none."""
KERNELS = {"qwen3": 180, "gpt2": 75}
"""Launched on a GPU per block and micro-batch, forward and backward, not compiled; compiled, a quarter of them."""
DECODE_KERNELS = 12
"""Per block of a decoding step."""
LAUNCH_SECONDS = 5e-6
"""From one kernel to the next, when the GPU waits for Python; assumed."""


@dataclass(frozen=True)
class Workload:
    """What a model asks of whatever runs it."""

    model: ModelConfig
    length: int
    """Tokens per sequence."""
    parameters: int
    matrices: tuple[tuple[int, int], ...]
    """Shapes of the blocks' weight matrices, which Muon moves."""
    flops_per_token: int
    """Of a training step, forward and backward."""

    @property
    def decode_flops(self) -> float:
        """Per token generated: two per weight that is multiplied by."""
        return 2 * self.read_weights

    @property
    def read_weights(self) -> int:
        """Weights that a decoding step reads: the blocks' matrices and the head."""
        return sum(a * b for a, b in self.matrices) + self.model.vocab_size * self.model.hidden_size

    @property
    def cache_bytes(self) -> int:
        """Keys and values per token, in bf16."""
        return 2 * 2 * self.model.num_layers * self.model.kv_heads * self.model.head_size


def workload(model: ModelConfig, length: int) -> Workload:
    """Counts, on a network without weights."""
    with torch.device("meta"):
        network = GPT(model)
    matrices = tuple((p.size(0), p.size(1)) for n, p in network.named_parameters() if p.ndim == 2 and "layers." in n)
    return Workload(model, length, network.num_parameters(), matrices, network.flops_per_token(length))


# --- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the worst moment of a step."""

    weights: float
    gradients: float
    buckets: float
    """DDP's copies of the gradients."""
    optimizer: float
    activations: float
    loss: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def training_memory(config: TrainConfig, work: Workload, workers: int) -> Memory:
    """What a worker needs; an upper bound where the model is compiled or has fewer key/value heads than heads."""
    micro = micro_batch(config, workers) * work.length  # tokens
    muon = sum(a * b for a, b in work.matrices) if config.optimizer == "muon" else 0
    casts = 2 * work.read_weights  # autocast's bf16 weights
    return Memory(
        weights=4 * work.parameters,
        gradients=4 * work.parameters,
        buckets=4 * work.parameters if workers > 1 else 0,
        optimizer=4 * muon + 8 * (work.parameters - muon),
        activations=FRAGMENTATION * (micro * saved_bytes(work.model) + casts),
        loss=FRAGMENTATION * micro * LOSS_BYTES * work.model.vocab_size,
        reserve=GPU_RESERVE,
    )


def saved_bytes(model: ModelConfig) -> int:
    """What autograd keeps per token, without the loss."""
    feature, inner, head, fixed, outside = SAVED_BYTES[model.family]
    block = feature * model.hidden_size + inner * (model.intermediate_size or 0) + head * model.num_heads + fixed
    return model.num_layers * block + outside * model.hidden_size


def micro_batch(config: TrainConfig, workers: int) -> int:
    """Sequences that a worker runs at once."""
    share = math.ceil(config.batch_size / workers)
    return min(config.micro_batch_size or share, share)


def largest_micro_batch(config: TrainConfig, work: Workload, workers: int, device: Device) -> int:
    """The most sequences at once for which there is memory; 0: not even one."""
    memory = training_memory(config, work, workers)
    per_sequence = FRAGMENTATION * work.length * (saved_bytes(work.model) + LOSS_BYTES * work.model.vocab_size)
    fixed = memory.total - per_sequence * micro_batch(config, workers)
    return max(0, int((device.memory - fixed) // per_sequence))


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on the worker with the most sequences."""

    products: float
    elementwise: float
    softmax: float
    optimizer: float
    launching: float
    """What a GPU waits for Python, because the micro-batch is too small."""
    gradients: float
    """What the all-reduce takes, hidden or not."""
    waiting: float
    """What of it backward does not hide."""

    @property
    def seconds(self) -> float:
        return self.products + self.elementwise + self.softmax + self.optimizer + self.launching + self.waiting


def training_step(config: TrainConfig, work: Workload, device: Device, rates: Rates, workers: int) -> Step:
    """Compute, then what of the gradients' way is left when the last backward ends."""
    model, fused = work.model, config.compile and device.name != "cpu"
    rows = math.ceil(config.batch_size / workers)
    tokens = rows * work.length
    products = tokens * work.flops_per_token / rates.products
    elementwise = tokens * model.num_layers * block_bytes(model, work.length, device.name, fused) / rates.elementwise
    softmax = tokens * model.vocab_size * (COMPILED_LOGIT_BYTES if fused else LOGIT_BYTES) / rates.softmax
    passes = math.ceil(rows / micro_batch(config, workers))
    launched = passes * model.num_layers * KERNELS[model.family] * LAUNCH_SECONDS / (4 if fused else 1)
    computing = products + elementwise + softmax
    launching = max(0.0, launched - computing) if device.name != "cpu" else 0.0
    # Only the last micro-batch's backward, two thirds of its time, runs beside the all-reduce.
    window = (computing + launching) / passes * 2 / 3
    gradients, last = all_reduce_seconds(4 * work.parameters, device, workers)
    waiting = max(gradients - window, last)
    optimizer = optimizer_seconds(config, work, rates)
    return Step(products, elementwise, softmax, optimizer, launching, gradients, waiting)


def block_bytes(model: ModelConfig, length: int, device: str, fused: bool = False) -> int:
    """Read and written outside matrix products per token and block."""
    scores = SCORE_BYTES * model.num_heads * length if device == "cpu" and length <= 512 else 0
    return model.hidden_size * (COMPILED_FEATURE_BYTES if fused else FEATURE_BYTES[model.family]) + scores


def all_reduce_seconds(size: float, device: Device, workers: int) -> tuple[float, float]:
    """(seconds for `size` bytes, seconds for the last bucket, which nothing hides), by a ring."""
    if workers == 1:
        return 0.0, 0.0
    speed = LINK_SHARE * (device.link if workers <= device.per_machine else min(device.link, device.network))
    ring = 2 * (workers - 1) / workers / speed
    latency = BUCKET_LATENCY * math.log2(workers)
    return size * ring + math.ceil(size / BUCKET) * latency, min(size, BUCKET) * ring + latency


def optimizer_seconds(config: TrainConfig, work: Workload, rates: Rates) -> float:
    """Every rank does all of it: AdamW reads and writes 28 bytes per parameter; Muon's five rounds are products."""
    if config.optimizer == "adamw":
        return 28 * work.parameters / rates.elementwise
    rounds = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in work.matrices)  # Newton-Schulz, FLOP
    moved = sum(a * b for a, b in work.matrices)
    return rounds / rates.products + (28 * (work.parameters - moved) + 20 * moved) / rates.elementwise


# --- serving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """What one replica does with requests of one size, its slots full, and how many of them a load takes."""

    load: float
    """Requests per second."""
    prompt_tokens: int
    new_tokens: int
    slots: int
    first_token_seconds: float
    """On an idle replica, the service's own milliseconds left out."""
    step_seconds: float
    """One more token for each of the slots."""
    requests_per_second: float
    """The most that it completes."""
    replicas: int


def serving(
    work: Workload,
    device: Device,
    rates: Rates,
    slots: int,
    prompt_tokens: int,
    new_tokens: int,
    requests_per_second: float,
) -> Serving:
    """Replicas for a load; prompts and tokens share a replica's time."""
    prompt = prompt_tokens * work.decode_flops / rates.prefill_products
    step = decode_seconds(work, device, rates, slots, prompt_tokens + new_tokens / 2)
    most = 1 / (REQUEST_SECONDS + (prompt + new_tokens * step / slots) / SERVICE_SHARE)
    return Serving(
        requests_per_second,
        prompt_tokens,
        new_tokens,
        slots,
        prompt + decode_seconds(work, device, rates, 1, prompt_tokens),
        step,
        most,
        math.ceil(requests_per_second / (UTILISATION * most)),
    )


def decode_seconds(work: Workload, device: Device, rates: Rates, sequences: int, context: float) -> float:
    """One step: the weights are read once, each sequence costs its products, its cache and some Python."""
    read = 2 * work.read_weights / rates.decode_bandwidth
    each = work.decode_flops / rates.decode_products + context * work.cache_bytes / rates.decode_bandwidth
    launched = work.model.num_layers * DECODE_KERNELS * LAUNCH_SECONDS if device.name != "cpu" else 0.0
    return STEP_SECONDS + max(read + sequences * each, launched) + sequences * TOKEN_SECONDS
