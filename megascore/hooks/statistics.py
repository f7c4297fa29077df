"""How a hook declares what it adds up: once, in global terms, so that everything else can be derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Merge", "State", "Statistic"]

State = Mapping[str, Tensor]
"""The tensors of a hook by statistic name."""


class Merge(Enum):
    """How the parts of one statistic, taken from different tokens or samples, become one."""

    SUM = "sum"
    REPLICATED = "replicated"
    """Not additive: every part holds the same value (a weight's norms, an agreed decision), and one counts."""


@dataclass(frozen=True)
class Statistic:
    """One tensor that a hook keeps.

    Only what merges exactly is a statistic: sums and counts, never means or roots.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    merge: Merge = Merge.SUM
    channel_dim: int | None = None
    """The tensor dimension that is split where channels are split over ranks; None where there are no channels."""
    of_samples: bool = False
    """True where one sample must be complete before it is added (a square of its mean, say).

    Ranks that hold parts of the same sample then add those parts first, and all hold the same statistic afterwards.
    """

    def zeros(self, device: torch.device | str) -> Tensor:
        """Return the statistic of no data: zeros of its shape and dtype on ``device``."""
        # One made in inference mode could not be added to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
