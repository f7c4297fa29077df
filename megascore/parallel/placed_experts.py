"""Routed experts whose outputs are spread over ranks as partial sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.hooks import RouterWeightedNormHook
from megascore.parallel.axes import Placement
from megascore.parallel.placed import PlacedHook

__all__ = ["PlacedRouterWeightedNormHook"]


class PlacedRouterWeightedNormHook(PlacedHook, RouterWeightedNormHook):
    """`RouterWeightedNormHook` at the routed experts of a layer.

    Under expert tensor parallelism an expert's output is a sum over the ranks of that axis, which Megatron adds up
    only after it has mixed the experts. The norm needs the sum, so it is added here in the forward pass, a few tokens
    at a time. All ranks of that axis have the same tokens, also none, so they make the same calls.
    """

    def put(self, placement: Placement, groups: Mapping[str, dist.ProcessGroup], device: torch.device | str) -> None:
        """Say where this hook is, and allocate its accumulators. Not collective."""
        super().put(placement, groups, device)
        self.partial_outputs = "etp" in self._groups

    def complete(self, partial: Tensor) -> None:
        """Add the parts of outputs that other ranks hold to ``partial``, in place. Collective over ``etp``."""
        dist.all_reduce(partial, group=self._groups["etp"])
