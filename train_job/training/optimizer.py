"""The optimizers and the learning-rate schedule.

In: a model and a config. Out: `Optimizers`, which uses Muon for the matrices inside the blocks and AdamW for everything
else, and `learning_rate_factor`, the schedule as a pure function.
"""

import math

import torch
from torch import Tensor, nn

from train_job.config import TrainConfig
from train_job.training.muon import Muon


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (0-based) of `total_steps`, as a share of the peak, in (0, 1]."""
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "wsd":
        decay = max(1, round(config.cooldown_fraction * total_steps))
        left = min(1.0, (total_steps - step) / decay)
    else:
        left = (total_steps - step) / max(1, total_steps - warmup)
        left = 0.5 * (1 - math.cos(math.pi * left)) if config.schedule == "cosine" else left
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * max(0.0, left)


class Optimizers:
    """The optimizers of one model, stepped together; one factor scales all peak learning rates."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if p.ndim == 2 and "layers." in n]
        embeddings = [p for n, p in trained if p.ndim == 2 and "layers." not in n]
        vectors = [p for n, p in trained if p.ndim < 2]  # gains and biases: never decayed
        muon = config.optimizer == "muon"
        decay = config.weight_decay
        groups = [
            {"params": embeddings, "weight_decay": 0.0 if muon else decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if not muon:
            groups.append({"params": matrices, "weight_decay": decay})
        fused = all(p.device.type in ("cpu", "cuda") for _, p in trained)
        betas = (config.beta1, config.beta2)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-10 if muon else 1e-8, fused=fused)
        ]
        if muon:
            self.parts.append(Muon(matrices, config.matrix_learning_rate, config.momentum, decay))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        for p in [*embeddings, *vectors, *(() if muon else matrices)]:  # now, so that a checkpoint can be read into it
            step = torch.zeros((), device=p.device if fused else "cpu")
            self.parts[0].state[p] = {"step": step, "exp_avg": zeros(p), "exp_avg_sq": zeros(p)}
        for p in matrices if muon else ():
            self.parts[1].state[p] = {"momentum_buffer": zeros(p)}

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; then clears the gradients."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state, not copied, under flat names: `0.12.exp_avg` is part 0, parameter 12."""
        return {
            f"{i}.{index}.{key}": value
            for i, part in enumerate(self.parts)
            for index, p in enumerate(p for group in part.param_groups for p in group["params"])
            for key, value in part.state[p].items()
        }


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
