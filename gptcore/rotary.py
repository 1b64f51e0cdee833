"""Rotary position embeddings (RoPE, Su et al. 2021) and the ways in which published models stretch them.

In: a `ModelConfig`. Out: tables of cosines and sines by position, numerically those of `transformers`.
Shapes: S positions, D = head_dim.
"""

import math

import torch
from torch import Tensor

from gptcore.config import ModelConfig, RopeScaling


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D), each half of D repeating the same D/2 frequencies."""
    S, D, scaling = config.context_length, config.head_size, config.rope_scaling
    if torch.get_default_device().type == "meta":  # arithmetic there would import torch's compiler, for seconds
        return torch.empty(S, D), torch.empty(S, D)
    angles = torch.outer(torch.arange(S).float(), rotary_frequencies(config)).repeat(1, 2)  # (S, D)
    factor = scaling.attention_factor if scaling is not None else 1.0
    return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of features, (D/2,)."""
    D, scaling = config.head_size, config.rope_scaling
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2).float() / D)
    return frequencies if scaling is None else _SCALED[scaling.kind](frequencies, config.rope_theta, scaling)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i+D/2}) of x (…, D) by its position's angle; cos and sin broadcast to x."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


def _linear(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """All positions closer together (Chen et al. 2023)."""
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Only long waves are stretched; those between two lengths partly (Llama 3.1, Grattafiori et al. 2024)."""
    slow = frequencies / scaling.factor
    turns = scaling.original_context / (2 * math.pi / frequencies)  # in the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    return torch.where(share < 0, slow, torch.where(share > 1, frequencies, between))


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Waves with few turns in the original context are stretched, a ramp over dimensions (YaRN, Peng et al. 2023)."""
    dimensions = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The dimension whose wave makes so many turns in the original context."""
        waves = math.log(scaling.original_context / (turns * 2 * math.pi))
        return dimensions * waves / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dimensions - 1)
    width = last - first or 0.001
    slow = 1.0 / (scaling.factor * theta ** (torch.arange(0, dimensions, 2).float() / dimensions))
    kept = 1 - ((torch.arange(len(frequencies)).float() - first) / width).clamp(0, 1)
    return slow * (1 - kept) + frequencies * kept


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
