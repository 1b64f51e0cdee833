"""Chooses 4-bit values by what a network multiplies them with: the error of its products, on a text, is to be small.

Before each matrix, the mean square of every input (column) is measured on the text. Of a group of weights x with these
mean squares h, values q and their scale s, the error is sum(h (x - s q)^2): that of the product, if inputs are not
correlated. Weighting by activations and searching the clipping are ideas of AWQ (Lin et al. 2023).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.hf_format import published_name
from gptcore.package import Package
from gptcore.quantised import GROUP, Quantised

MOST_TOKENS = 8192
LEAST_TOKENS = 256
WINDOW = 512
"""Tokens that the network reads at once, the end-of-text token first."""
GRID = (*torch.arange(-10.0, -4.0, 0.25).tolist(), *torch.arange(6.0, 9.0, 0.25).tolist())
"""What the largest weight of a group is tried as, before values are cut to -8 ... 7."""
ROWS = 256
"""Rows of a matrix that are searched at once, to stay in the CPU caches."""


@torch.inference_mode()
def input_squares(package: Package, text: str) -> dict[str, Tensor]:
    """Mean square of each matrix's inputs, (in,), on the beginning of `text`, by published name.

    It has the whole model in memory, in fp32. Raises ConfigError if the text is too short.
    """
    ids = package.tokenizer.encode(text)[:MOST_TOKENS]
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; expected at least {LEAST_TOKENS}, better some thousands")
    model, squares = package.load_model(), dict[str, Tensor]()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].flatten(0, -2)  # (tokens, in)
            squares[name] = squares.get(name, 0) + rows.square().sum(0) / len(ids)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(published_name(f"{name}.weight", package.config.family)))
    length = min(WINDOW, package.config.context_length) - 1  # logits, which nobody reads, take V numbers a token
    for start in range(0, len(ids), length):
        model(torch.tensor([[package.tokenizer.eot, *ids[start : start + length]]]))
    return squares


def improved(matrix: Tensor, rounded: Quantised, squares: Tensor) -> Quantised:
    """`rounded`, 4-bit values of a matrix (out, in), with those groups replaced for which there are better ones."""
    h = squares.view(-1, GROUP)
    blocks = zip(matrix.split(ROWS), rounded.values.split(ROWS), rounded.scales.split(ROWS), strict=True)
    made = [_search(part.float().unflatten(1, (-1, GROUP)), values, scales, h) for part, values, scales in blocks]
    values, scales = zip(*made, strict=True)
    return Quantised(torch.cat(values), torch.cat(scales))


def _search(x: Tensor, values: Tensor, scales: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The best values and scales of groups x (rows, groups, 32), starting from given ones."""
    best, values, scales = error_of(x, values, scales, h), values.clone(), scales.clone()
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    hx = h * x
    for steps in GRID:
        q = (x * (steps / largest)).nan_to_num().round().clamp(-8, 7)
        scale = ((hx * q).sum(-1) / (h * q * q).sum(-1)).nan_to_num().bfloat16()
        q = (x / scale.float().unsqueeze(-1)).nan_to_num().round().clamp(-8, 7).to(torch.int8)
        error = error_of(x, q, scale, h)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        values = torch.where(better.unsqueeze(-1), q, values)
    return values, scales


def error_of(x: Tensor, values: Tensor, scales: Tensor, h: Tensor) -> Tensor:
    """The error (rows, groups) of groups x (rows, groups, 32) as values and scales, weighted by h (groups, 32)."""
    return (h * (x - values * scales.float().unsqueeze(-1)).square()).sum(-1)
