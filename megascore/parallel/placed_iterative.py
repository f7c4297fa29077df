"""Iterative pruning in a parallel world: every rank decides the same, from what all ranks measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.hooks import IterativeChannelContributionHook
from megascore.hooks.statistics import Merge, Statistic
from megascore.parallel.axes import Axis, Placement, Role
from megascore.parallel.placed import PlacedHook

__all__ = ["PlacedIterativeHook"]

DECISIONS = ("prune_position", "agg_contribution")
"""What is decided over all channels of the layer, and so is kept for all of them on every rank."""


class PlacedIterativeHook(PlacedHook, IterativeChannelContributionHook):
    """`IterativeChannelContributionHook` where other ranks have other channels, other tokens or other samples.

    A step is an iteration: what the ranks measured is added up in `step`, over every axis, and then all of them choose
    the same channels. Inside a forward pass the residual, [tokens, outputs], is added over the ranks that hold the
    layer's other channels; nothing else is communicated there.
    """

    def put(self, placement: Placement, groups: Mapping[str, dist.ProcessGroup], device: torch.device | str) -> None:
        """Say where this hook is. Before the first iteration; not collective."""
        super().put(placement, groups, device)
        self.defers = True
        declared = self.declare(placement.shard.length)
        self._state.update({s.name: s.zeros(device) for s in declared if s.name in DECISIONS})
        self._index_channels()

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the parent's statistics, the decisions over all channels of the layer."""
        declared = super().declare(num_channels)
        if self._placement is None:
            return declared
        total = (self._placement.shard.total,)
        return tuple(
            Statistic(s.name, total, s.dtype, Merge.REPLICATED) if s.name in DECISIONS else s for s in declared
        )

    @property
    def settling_groups(self) -> Mapping[str, dist.ProcessGroup]:
        """All groups that share the place: they must agree."""
        return self._groups

    def settle(self, summed: list[Tensor]) -> None:
        """End the iteration; ranks with other channels of the same tokens have counted those tokens too."""
        sums, count = summed
        for axis in self._axes(Role.SHARD):
            count = count / axis.size
        super().settle([sums, count])

    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call. Collective over the ranks that hold the layer's shards, from the second iteration on."""
        super().observe(inputs, self._whole_output(inputs, output), token_mask)

    def _whole_output(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the output of all tokens of ``inputs``: with sequence parallelism a layer gives only this rank's."""
        if output.shape[:-1] == inputs.shape[:-1]:
            return output
        if self._calibration_method is None:
            # Only its shape is needed.
            return output.new_empty(1).expand(*inputs.shape[:-1], output.shape[-1])
        for axis in self._axes(Role.SHARD):
            parts = [torch.empty_like(output) for _ in range(axis.size)]
            dist.all_gather(parts, output.contiguous(), group=self._groups[axis.name])
            output = torch.cat(parts)
        return output

    def _reduce_over_shards(self, residual: Tensor) -> Tensor:
        for axis in self._axes(Role.SHARD):
            # A product may be a view of a wider one, which NCCL refuses.
            residual = residual.contiguous()
            dist.all_reduce(residual, group=self._groups[axis.name])
        return residual

    def _own_channels(self, values: Tensor) -> Tensor:
        if self._placement is None:
            return values
        return values.narrow(0, self._placement.shard.offset, self._placement.shard.length)

    def _num_pruned_here(self, pruned: Tensor) -> int:
        # Asks the device, but only at the end of an iteration that pruned.
        return int(pruned.sum()) if self._num_pruned() else 0

    def _axes(self, role: Role) -> tuple[Axis, ...]:
        return () if self._placement is None else self._placement.axes(role)
