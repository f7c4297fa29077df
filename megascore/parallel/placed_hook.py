"""Hooks that know their place in a parallel world, and so give global results by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State
from megascore.parallel.axes import Placement, Role
from megascore.parallel.comm import sum_in_place

__all__ = ["PlacedHook"]


class PlacedHook(ForwardHook):
    """Mixed in before a plain hook: its results, saved states and loading are then in global terms.

    ``accumulate``, ``to_dict``, ``state_dict`` and ``step`` are collective over the ranks that share the place; the
    forward pass communicates nothing for additive scores. Without a place it is its parent.
    """

    _placement: Placement | None = None
    _groups: Mapping[str, dist.ProcessGroup] = {}

    def put(self, placement: Placement, groups: Mapping[str, dist.ProcessGroup], device: torch.device | str) -> None:
        """Say where this hook is, and allocate its accumulators. Not collective.

        Args:
            placement: Roles of the axes, and this rank's channels.
            groups: Process group of every axis larger than 1 that shares this place, by axis name.
            device: Device of the activations.
        """
        self._placement = placement
        self._groups = {
            axis.name: groups[axis.name] for axis, role in placement.roles if axis.size > 1 and role is not Role.OWN
        }
        self.defers = placement.splits_samples
        self.allocate(placement.shard.length, device)

    def step(self) -> None:
        """Add up the parts of samples that other ranks hold. Collective over the axes that split the sequence.

        Called by itself before results are given; call it now and then in a long run, because parts that wait take
        memory.
        """
        if self._placement is None or not self.defers:
            return
        waiting = self.pending()
        for axis in self._placement.axes(Role.SUM_SEQUENCE):
            sum_in_place(waiting, self._groups[axis.name])
        self.settle(waiting)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the statistics over all ranks that share this place, in global terms. Collective over them."""
        if self._placement is None:
            return super().merged_state()
        self.step()
        statistics = self.statistics(self._placement.shard.total)
        merged = [self._placement.contribution(statistic, self.state[statistic.name]) for statistic in statistics]
        for group in self._groups.values():
            sum_in_place(merged, group)
        return {s.name: value.to(s.dtype) for s, value in zip(statistics, merged, strict=True)}

    def adopt(self, merged: State) -> None:
        """Take over this rank's part of a merged state. Not collective, but all ranks that share the place do it."""
        if self._placement is None:
            return super().adopt(merged)
        for statistic in self.statistics(self._placement.shard.total):
            self.state[statistic.name].copy_(self._placement.local_part(statistic, merged[statistic.name]))
        return None

    def _global_num_channels(self) -> int | None:
        return self._num_channels if self._placement is None else self._placement.shard.total
