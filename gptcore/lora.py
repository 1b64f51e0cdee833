"""Low-rank adapters (LoRA, Hu et al. 2021): added to a network, merged into a package, written for PEFT.

In: a network and a `Lora`. Out: the same network with its weights frozen and adapters to train; and from trained ones,
parameters of a whole model, or a folder that `peft` loads.
Shapes: a matrix W (out, in) gets A (r, in) and B (out, r).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gptcore.config import ALL_LINEAR, LORA_TARGETS, Lora, ModelConfig
from gptcore.errors import ConfigError
from gptcore.files import whole_folder
from gptcore.hf_format import empty_model, from_published, published_name
from gptcore.model import GPT
from gptcore.package import Package
from gptcore.weights import DTYPES, read_tensors, require_finite

A, B = "lora_A", "lora_B"


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter; (..., in) to (..., out). The weight keeps its name."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.lora, self.weight, self.bias = lora, linear.weight, linear.bias
        rows, columns, device = *linear.weight.shape, linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(lora.rank, columns, device=device))
        self.lora_B = nn.Parameter(torch.empty(rows, lora.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.lora.dropout, self.training)
        added = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.lora.scale * added


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((A, B))


def add_adapters(model: GPT, lora: Lora, dtype: torch.dtype) -> None:
    """Freezes a network on the meta device and gives its targets adapters in fp32.

    Its matrices become `dtype`, that of the products. The residual stream stays in fp32, as in a network whose
    embedding is. Raises ConfigError for targets that it does not have.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())
    for name, linear in targets(model, lora):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, LoraLinear(linear, lora))


def targets(model: GPT, lora: Lora) -> list[tuple[str, nn.Linear]]:
    """The linear layers that get adapters, by name.

    Raises ConfigError if the network lacks a target, or if the rank is more than a matrix's shorter side.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    known = [target for target in LORA_TARGETS if any(name.endswith(f".{target}") for name in layers)]
    chosen = known if ALL_LINEAR in lora.targets else lora.targets
    for target in chosen:
        if target not in known:
            raise ConfigError(
                f"lora_targets has {target!r}, which a {model.config.family} does not have; expected {ALL_LINEAR} or "
                f"some of {', '.join(known)}"
            )
    found = [(name, linear) for name, linear in layers.items() if name.rpartition(".")[2] in chosen]
    if (most := min(min(linear.weight.shape) for _, linear in found)) < lora.rank:
        raise ConfigError(f"lora_rank is {lora.rank}; expected at most {most}, the shorter side of the smallest matrix")
    return found


def check_adapters(config: ModelConfig, lora: Lora) -> int:
    """The number of parameters in the adapters of a network of this shape. Raises ConfigError as `targets` does."""
    return sum(lora.rank * sum(linear.weight.shape) for _, linear in targets(empty_model(config), lora))


def initial_adapters(config: ModelConfig, lora: Lora, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each adapter at the start: A is U(-s, s) with s = 1/sqrt(in), as PEFT's, and B is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in targets(empty_model(config), lora):
        rows, columns = linear.weight.shape
        s = 1 / math.sqrt(columns)
        yield f"{name}.{A}", torch.empty(lora.rank, columns).uniform_(-s, s, generator=generator)
        yield f"{name}.{B}", torch.zeros(rows, lora.rank)


class Merged(Mapping[str, Tensor]):
    """A package's parameters, tied ones once, with adapters added, each computed when it is asked for.

    They have the dtype in which the package stores them, or float32 instead of 8 or 4 bits. Raises PackageError for one
    that this dtype cannot hold.
    """

    def __init__(self, base: Package, adapters: Mapping[str, Tensor], lora: Lora) -> None:
        self._base, self._adapters, self._lora = base, adapters, lora
        self._model, self._places = empty_model(base.config), base.places()
        self._names = dict(self._model.named_parameters()).keys()

    def __getitem__(self, name: str) -> Tensor:
        published = published_name(name, self._base.config.family)
        stored = read_tensors({published: self._places[published]})
        weight = dict(from_published(self._model, stored))[name]
        stem = name.removesuffix("weight")
        if f"{stem}{A}" not in self._adapters:
            return weight
        product = self._adapters[f"{stem}{B}"].float() @ self._adapters[f"{stem}{A}"].float()
        merged = weight.float().add_(product, alpha=self._lora.scale).to(weight.dtype)
        require_finite(name, merged)
        return merged

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would compute it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_adapter(folder: Path, base: Package, called: str, adapters: Mapping[str, Tensor], lora: Lora) -> None:
    """Writes adapters as PEFT has them, in the dtype of the base, which is `called` so. It appears whole or not at all.

    In GPT-2 q, k and v are one matrix, so their adapters become one of three times the rank. Raises OSError.
    """
    family, r = base.config.family, lora.rank
    dtype = DTYPES[next(iter(base.places().values())).dtype]
    groups: dict[str, list[str]] = {}
    for name, _ in targets(empty_model(base.config), lora):
        groups.setdefault(published_name(f"{name}.weight", family).removesuffix(".weight"), []).append(name)
    tensors, modules, ranks = {}, dict[str, None](), {}
    for published, names in groups.items():
        a = torch.cat([adapters[f"{name}.{A}"] for name in names])
        b = adapters[f"{names[0]}.{B}"]
        module = re.sub(r".*\.\d+\.", "", published)
        modules[module] = None
        if family == "gpt2" and module == "attn.c_attn":
            C = len(b)
            b = torch.zeros(3 * C, len(a))
            for i, name in enumerate(names):
                row = C * "qkv".index(name.rpartition(".")[2][0])
                b[row : row + C, r * i : r * (i + 1)] = adapters[f"{name}.{B}"]
            ranks[module] = len(a)
        tensors[f"base_model.model.{published}.{A}.weight"] = a.to(dtype).contiguous()
        tensors[f"base_model.model.{published}.{B}.weight"] = b.to(dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": called,
        "r": r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [*modules],
        "rank_pattern": ranks,
        "alpha_pattern": {module: lora.scale * rank for module, rank in ranks.items()},
        "fan_in_fan_out": family == "gpt2",  # its matrices are stored as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    with whole_folder(folder) as draft:
        save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        (draft / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
