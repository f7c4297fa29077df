"""Hooks that know their place in a parallel world, and so give global results by themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import Statistic
from megascore.parallel.axes import Placement, Role, in_own_dtype
from megascore.parallel.comm import sum_in_place

__all__ = ["PlacedHook"]


class PlacedHook(ForwardHook):
    """Mixed in before a plain hook: its results, saved states and loading are then in global terms.

    ``accumulate``, ``to_dict``, ``state_dict`` and ``step`` are collective over the ranks that share the place; the
    forward pass communicates nothing for additive scores. Without a place it is its parent.
    """

    takes_shards = True

    _placement: Placement | None = None
    _groups: Mapping[str, dist.ProcessGroup] = {}

    def put(self, placement: Placement, groups: Mapping[str, dist.ProcessGroup], device: torch.device | str) -> None:
        """Say where this hook is, and allocate its accumulators. Not collective.

        Args:
            placement: Roles of the axes, and this rank's channels.
            groups: Process groups of more than one rank that together hold all who share this place, by axis name.
            device: Device of the activations.
        """
        self._placement = placement
        self._groups = dict(groups)
        self.defers = placement.splits_samples
        self.allocate(placement.shard.length, device)

    @property
    def placement(self) -> Placement:
        """Where this hook was put."""
        assert self._placement is not None, f"{type(self).__name__} was put nowhere"
        return self._placement

    @property
    def total_channels(self) -> int:
        """Channels of the place on all ranks."""
        return self.placement.shard.total

    @property
    def settling_groups(self) -> Mapping[str, dist.ProcessGroup]:
        """Groups over which `pending` is added, by axis: those whose ranks hold other parts of the same samples."""
        if self._placement is None:
            return {}
        return {axis.name: self._groups[axis.name] for axis in self._placement.axes(Role.SUM_SEQUENCE)}

    def step(self) -> None:
        """Add up what waits for other ranks. Collective over the axes of `settling_groups`.

        Called by itself before results are given; call it now and then in a long run, because parts that wait take
        memory.
        """
        if self._placement is None or not self.defers:
            return
        waiting = self.pending()
        for group in self.settling_groups.values():
            sum_in_place(waiting, group)
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
        return {s.name: in_own_dtype(s, value) for s, value in zip(statistics, merged, strict=True)}

    def _local_part(self, statistic: Statistic, merged: Tensor) -> Tensor:
        return merged if self._placement is None else self._placement.local_part(statistic, merged)

    def _global_num_channels(self) -> int | None:
        return self._num_channels if self._placement is None else self._placement.shard.total
