"""The order of two score vectors: do they rank alike?"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_same_order", "spearman"]


def assert_same_order(score: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    """Identical in float64; otherwise it differs only between scores that the tolerance can't tell apart."""
    if tolerance <= 1e-9:
        assert torch.equal(score.argsort(stable=True), expected.argsort(stable=True)), f"order of {message}"
    ordered = expected[score.argsort(stable=True)]
    assert (ordered.diff() >= -2 * tolerance * ordered[1:].abs()).all(), f"order of {message}"


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1])
