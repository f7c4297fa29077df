"""A stand-in for a module whose weight is one part of a larger tensor."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["WeightAlone"]


class WeightAlone(nn.Module):
    """A module with a weight and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        """Take the weight as it is, with the marks that are on it."""
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
