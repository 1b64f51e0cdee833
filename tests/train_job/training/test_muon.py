"""Muon's orthogonalisation. That workers share it, and agree, is tested in test_sharded.py."""

import pytest
import torch

from train_job.training import muon


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (32, 32), (40, 32)])
def test_muon_orthogonalises_matrices(shape: tuple[int, int], has_bf16: bool, monkeypatch: pytest.MonkeyPatch):
    """The singular vectors stay, and singular values from 0.003 of the largest on are near 1."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    random = torch.Generator().manual_seed(1)
    short = min(shape)
    left, right = (torch.linalg.qr(torch.randn(5, side, short, generator=random)).Q for side in shape)
    spread = torch.logspace(0, -2, short)
    spread = torch.stack([spread, spread.clamp(max=0.05), spread**0.1, torch.eye(short)[0] + 1e-6, spread * 1e-4])
    found = muon.orthogonalise((left * spread[:, None]) @ right.mT)
    assert found.dtype == torch.bfloat16
    values = left.mT @ found.float() @ right  # (5, short, short), diagonal up to rounding
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < (0.25 if has_bf16 else 0.02)
    wide = torch.cat([diagonal[[0, 1, 2, 4]].flatten(), diagonal[3, :1]])
    assert wide.min() > 0.65
    assert wide.max() < 1.35


def test_muon_leaves_a_matrix_of_zeros_alone():
    assert torch.equal(muon.orthogonalise(torch.zeros(2, 8, 24)), torch.zeros(2, 8, 24, dtype=torch.bfloat16))


def test_a_matrix_is_orthogonalised_alike_alone_and_beside_others():
    updates = torch.randn(6, 24, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone = torch.cat([muon.orthogonalise(update[None]) for update in updates])
    torch.testing.assert_close(muon.orthogonalise(updates), alone, atol=1e-2, rtol=0)
