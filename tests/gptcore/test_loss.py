"""Claims about the loss that is computed in chunks: it and its gradients are those of the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptcore.loss import IGNORE, chunk_rows, head_cross_entropy
from tests.memory import allocated

VOCABULARY, WIDTH = 700, 32


@pytest.fixture(params=[1, 1024, 2300], ids=["one token", "one chunk", "three chunks"])
def inputs(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C), weight (V, C), targets (N,); every fifth token does not count."""
    torch.manual_seed(0)
    x, weight = torch.randn(request.param, WIDTH), torch.randn(VOCABULARY, WIDTH) / 4
    targets = torch.randint(0, VOCABULARY, (request.param,))
    targets[4::5] = IGNORE
    return x.requires_grad_(), weight.requires_grad_(), targets


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=IGNORE, reduction="sum")


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(0.25 * loss, of)


def test_loss_and_gradients_are_those_of_the_whole_logits(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    assert chunk_rows(WIDTH) == 1024
    loss, expected = head_cross_entropy(*inputs), whole(*inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, *inputs[:2]), gradients(expected, *inputs[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_under_autocast_they_are_as_close_to_fp32_as_the_whole_logits_are(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    exact = gradients(whole(*inputs), *inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = head_cross_entropy(*inputs), whole(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    for parts in zip(gradients(ours, *inputs[:2]), gradients(theirs, *inputs[:2]), exact, strict=True):
        assert all(part.dtype == torch.float32 for part in parts)
        here, there = ((part - parts[2]).norm() for part in parts[:2])
        assert here <= 1.1 * there


def test_a_frozen_head_gets_no_gradient_and_evaluation_computes_none(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets = inputs
    head_cross_entropy(x, weight.detach(), targets).backward()
    assert x.grad is not None
    trained, frozen = (allocated(lambda w=w: head_cross_entropy(x, w, targets))[1] for w in (weight, weight.detach()))
    assert trained - frozen == 4 * weight.numel()  # the gradient's bytes
    with torch.inference_mode():
        loss = head_cross_entropy(*inputs)
    torch.testing.assert_close(loss, whole(*inputs), rtol=1e-6, atol=0)
    assert not loss.requires_grad


@pytest.mark.parametrize("inputs", [1024], indirect=True)
def test_a_target_of_vanishing_probability_has_a_finite_loss(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets = inputs
    with torch.no_grad():
        weight *= 200  # the softmax of most tokens underflows to 0
    loss, expected = head_cross_entropy(x, weight, targets), whole(x, weight, targets)
    assert expected > 100 * len(targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, x, weight), gradients(expected, x, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
