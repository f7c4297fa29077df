"""KV heads at the attention output projection, also where one head's query heads are spread over several ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascore.hooks.weights import whole_weight
from megascore.mcore.sites.placement import own_columns, place_kv_heads, place_row_parallel_input
from megascore.mcore.world.groups import DenseGroups
from megascore.sites.weight_alone import WeightAlone

__all__ = ["KvHeads"]


class KvHeads:
    """This rank's KV heads of a projection, and the columns that belong to them.

    With fewer KV heads than tensor-parallel ranks the query heads of one KV head are spread over several ranks. Their
    outputs must be added before a norm is taken, so each forward pass then gathers the projection's input.
    """

    def __init__(self, linear: nn.Module, num_kv_heads: int, groups: DenseGroups) -> None:
        """Find this rank's heads. Not collective.

        Args:
            linear: The projection.
            num_kv_heads: KV heads of the whole layer.
            groups: Groups of the dense layers.

        Raises:
            LayoutError: heads and tensor-parallel ranks do not divide one another.
        """
        self.placement = place_kv_heads(num_kv_heads, groups)
        self._linear: Any = linear
        self._group = groups.larger_than_one("tp").get("tp")
        self._columns = place_row_parallel_input(linear, groups).shard
        self._width = self._columns.total // num_kv_heads

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have query heads of this rank's KV heads."""
        return self._columns.length < self.placement.shard.length * self._width

    def module(self) -> nn.Module:
        """Return a module with the weight [E, heads * width] of these heads. Collective over ``tp`` if spread."""
        return WeightAlone(self.own(whole_weight(self._linear.weight).detach()))

    def own(self, values: Tensor) -> Tensor:
        """Return the columns [..., heads * width] of these heads, whoever has them. Collective over ``tp`` if spread.

        Args:
            values: [..., this rank's columns], or all columns where the layer takes them whole.
        """
        values = own_columns(values, self._columns)
        if not self.is_spread:
            return values
        parts = [torch.empty_like(values) for _ in range(self._columns.total // self._columns.length)]
        dist.all_gather(parts, values.contiguous(), group=self._group)
        shard = self.placement.shard
        return torch.cat(parts, dim=-1).narrow(-1, shard.offset * self._width, shard.length * self._width)
