"""Statistics: a hook declares what it adds up once, in global terms, so that everything else can be derived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Merge", "State", "Statistic", "differences"]

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

    groups: int | None = None
    """In how many groups of equal size the entries of a finished score compete; None where all of them do."""

    def zeros(self, device: torch.device | str) -> Tensor:
        """Return the statistic of no data: zeros of its shape and dtype on ``device``."""
        # One made in inference mode could not be added to outside of it.
        with torch.inference_mode(False):
            return torch.zeros(self.shape, dtype=self.dtype, device=device)


def differences(declared: Iterable[Statistic], saved: State) -> list[str]:
    """Name every statistic that a state lacks, has beside those declared, or has in another shape or type."""
    wanted = {statistic.name: statistic for statistic in declared}
    found = [f"'{name}' is missing" for name in wanted if name not in saved]
    found += [f"'{name}' is there, but not kept here" for name in saved if name not in wanted]
    for name, statistic in wanted.items():
        if name not in saved:
            continue
        tensor = saved[name]
        if tuple(tensor.shape) != statistic.shape:
            found.append(f"'{name}' has shape {list(tensor.shape)} there, {list(statistic.shape)} here")
        if tensor.dtype != statistic.dtype:
            found.append(f"'{name}' is {_short(tensor.dtype)} there, {_short(statistic.dtype)} here")
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
