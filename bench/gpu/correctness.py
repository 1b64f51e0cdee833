"""Checks on a GPU: the network and the engine's tokens are those of a CPU, a run resumes, attention is fused."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.shapes import RandomTokens, Sizes, config_of
from bench.weights import random_package
from gptcore.config import MODEL_FIELDS, ModelConfig
from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.model import GPT
from gptcore.package import Package
from gptcore.sampling import SamplingParams
from train_job.training.checkpoint import save_checkpoint
from train_job.training.events import CheckpointDue
from train_job.training.loop import Trainer

LOGITS, LOSS, GRADIENTS = 2e-3, 1e-5, 1e-3
"""Largest accepted differences in fp32: of any logit, and relative ones of the loss and of all gradients together."""
FUSED = ("flash", "cudnn")
"""Names of the attention kernels that never store all scores."""

Check = tuple[bool | None, str]
"""Whether it holds, None if it cannot be asked on this device; and what was measured."""


def measure(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Each check's name with `ok` and `measured`. A check that raises is one that fails."""
    for name, check in checks(device, sizes):
        yield {"checks": {name: result(check)}}


def checks(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The checks by name."""
    for family in ("gpt2", "qwen3"):
        shape = ModelConfig(**sizes.checked, family=family)
        yield f"{family}: forward, loss and gradients in fp32 as on the CPU", partial(same_network, shape, device)
        yield f"{family}: a resumed run ends with the same bits", partial(resumes, shape, device)
        yield f"{family}: the same with torch's deterministic kernels", partial(resumes_exactly, shape, device)
        yield f"{family}: attention is fused", partial(attention_is_fused, shape, device)
        yield f"{family}: no step waits for the device", partial(never_waits, shape, device)
    yield "the engine's greedy tokens in fp32 as on the CPU", partial(same_tokens, sizes, device)


def result(check: Callable[[], Check]) -> dict[str, Any]:
    """Runs one check."""
    try:
        ok, measured = check()
    except Exception as error:  # a kernel that fails must not hide the other checks
        ok, measured = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"ok": ok, "measured": measured}


def same_network(shape: ModelConfig, device: torch.device) -> Check:
    """Compares logits, loss and gradients of the same weights."""
    torch.manual_seed(1)
    here = GPT(shape)
    for parameter in here.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)  # the qwen3 family starts with zeros
    there = GPT(shape)
    there.load_state_dict(here.state_dict())
    there.to(device)
    tokens = torch.randint(0, shape.vocab_size, (2, shape.context_length))
    with torch.no_grad():
        logits = (here(tokens) - there(tokens.to(device)).cpu()).abs().max().item()
    losses = []
    for model, ids in ((here, tokens), (there, tokens.to(device))):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
    loss_error = abs(losses[0] - losses[1]) / losses[0]
    ours, theirs = (
        torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]) for model in (here, there)
    )
    gradients = ((ours - theirs).norm() / ours.norm()).item()
    ok = logits <= LOGITS and loss_error <= LOSS and gradients <= GRADIENTS
    return ok, f"logits differ by {logits:.1e}, loss by {loss_error:.1e}, gradients by {gradients:.1e}"


def small_trainer(shape: ModelConfig, device: torch.device) -> Trainer:
    """A run of six steps of sixteen sequences in bf16, with a checkpoint after three."""
    model = {f.name: getattr(shape, f.name) for f in MODEL_FIELDS}
    config = config_of(dict(preset="quick", batch_size=16, micro_batch_size=8, checkpoint_interval=3) | model, 6)
    torch.manual_seed(config.seed)
    train, validation = (RandomTokens(shape.vocab_size, count) for count in (100 * config.context, 1000))
    return Trainer(config, GPT(shape), train, validation, device)  # type: ignore[arg-type]


def resumes(shape: ModelConfig, device: torch.device) -> Check:
    """Compares an uninterrupted run with one that starts again from its checkpoint."""
    whole, first, second = (small_trainer(shape, device) for _ in range(3))
    for _ in whole.run():
        pass
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        folder, identity = Path(scratch) / "checkpoint", first.identity("random")
        for event in first.run():
            if isinstance(event, CheckpointDue):
                save_checkpoint(folder, first.state, identity, first.tensors())
                break
        second.restore(folder)
    for _ in second.run():
        pass
    other = [name for name, tensor in whole.tensors().items() if not torch.equal(tensor, second.tensors()[name])]
    # Some attention kernels of a GPU add up in changing order, so there only resumes_exactly decides.
    undecided = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
    ok = not other or (None if undecided else False)
    return ok, f"{len(other)} of {len(whole.tensors())} parameters differ {', '.join(other[:2])}".strip()


def resumes_exactly(shape: ModelConfig, device: torch.device) -> Check:
    """The same with torch's deterministic kernels, so that a difference above can be told from a wrong resume."""
    if device.type == "cpu":
        return None, "a CPU has no others"
    torch.use_deterministic_algorithms(True)
    try:
        return resumes(shape, device)
    finally:
        torch.use_deterministic_algorithms(False)


def attention_is_fused(shape: ModelConfig, device: torch.device) -> Check:
    """Looks up which attention kernel a training step calls."""
    trainer = small_trainer(shape, device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer._step(0)
    names = {event.name for event in profiler.events() or [] if "scaled_dot_product" in event.name}
    kernels = sorted(name.removeprefix("aten::_scaled_dot_product_") for name in names if "::_scaled" in name)
    if device.type == "cpu":
        return None, f"on a CPU: {', '.join(kernels) or 'plain products'}"
    return any(kernel.startswith(FUSED) for kernel in kernels), ", ".join(kernels) or "no fused kernel"


def never_waits(shape: ModelConfig, device: torch.device) -> Check:
    """Takes a step while torch raises an error for every operation that waits for the GPU."""
    if device.type != "cuda":
        return None, "torch can only say so of CUDA"
    trainer = small_trainer(shape, device)
    trainer._step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, "none in two micro-batches and an optimizer step"


def same_tokens(sizes: Sizes, device: torch.device) -> Check:
    """Continues prompts greedily on both devices, in fp32."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        package = random_package(Path(scratch) / "package", sizes.preset, sizes.vocab_size)
        here, there = (greedy(package, kind, sizes) for kind in ("cpu", device.type))
    same = sum(a == b for a, b in zip(here, there, strict=True))
    return same == len(here), f"{same} of {len(here)} texts of {sizes.new_tokens} tokens"


def greedy(package: Package, device: str, sizes: Sizes) -> list[list[int]]:
    """Eight greedy continuations."""
    settings = EngineSettings(slots=4, max_queue=8, device=device, dtype="float32", backend="torch")
    engine = Engine(package, settings)
    engine.warm_up()
    found: dict[str, list[int]] = {str(number): [] for number in range(8)}
    params = SamplingParams(max_new_tokens=sizes.new_tokens, temperature=0, ignore_eos=True)
    for name in found:
        prompt = tuple((int(name) * 31 + i) % 200 for i in range(sizes.prompt_tokens))
        engine.add(Request(name, prompt, params))
    while engine.busy:
        for update in engine.step():
            found[update.request_id] += update.token_ids
    engine.close()
    return list(found.values())
