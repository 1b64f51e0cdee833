"""Claims about how blocks are run: recomputing their activations saves memory and changes no bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.model import GPT
from tests.memory import allocated
from train_job.config import build_config
from train_job.training.parallel import prepare_model

SEQUENCES = 2
LONG = 640
"""Tokens for which attention is fused on a CPU, as it is on a GPU."""


def shape(family: str, **changes: Any) -> ModelConfig:
    small = dict(vocab_size=512, context_length=64, hidden_size=64, num_layers=2, num_heads=2)
    return ModelConfig(**{**small, "family": family, **changes})


def trained(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) of one batch."""
    torch.manual_seed(3)
    model = GPT(config)
    prepare_model(model, build_config(dict(max_steps=1), settings))
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, config.context_length))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(tokens, tokens)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_loss_and_gradients_are_the_same_bits(family: str, dtype: torch.dtype, dropout: float):
    config = shape(family, dropout=dropout)
    loss, gradients = trained(config, dtype)
    again, recomputed = trained(config, dtype, checkpoint_activations=True)
    assert torch.equal(loss, again)
    assert len(gradients) == len(recomputed) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_all_blocks_share_one_compilation_with_fixed_shapes(
    family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    loss, gradients = trained(shape(family, num_layers=4), compile=True, checkpoint_activations=checkpointed)
    assert len(graphs) == 2  # a block, and the loss
    monkeypatch.undo()
    eager, expected = trained(shape(family, num_layers=4), checkpoint_activations=checkpointed)
    torch.testing.assert_close(loss, eager)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_activations_take_less_than_a_third(family: str):
    def kept(**settings: Any) -> int:
        """Bytes that remain allocated after the forward pass, without the gradients that the loss holds."""
        model = GPT(shape(family, context_length=LONG, num_layers=8))
        prepare_model(model, build_config(dict(max_steps=1), settings))
        tokens = torch.zeros(SEQUENCES, LONG, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            return allocated(lambda: model(tokens, tokens))[1] - 4 * 64 * (512 + SEQUENCES * LONG)

    assert kept(checkpoint_activations=True) < kept() / 3
