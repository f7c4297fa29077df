"""Tensor-parallel subclasses of the hooks: put on a module of Megatron-Core, they give the whole model's scores.

Each can be used by itself (``linear.register_forward_hook(MegatronL2NormHook())``): it reads groups and channels from
its module, and ``accumulate()``, ``to_dict()`` and ``state_dict()`` are then collective over the ranks that share the
module, and return the whole result on each of them. On a model that isn't parallel each equals its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascore.hooks import (
    BlockSimilarityHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from megascore.hooks.weights import whole_weight
from megascore.mcore.sites.fused_norm import WeightAlone, norm_module
from megascore.mcore.sites.heads import kv_heads_of_projection
from megascore.mcore.sites.placement import place_hidden_states, place_kv_heads, place_row_parallel_input
from megascore.mcore.world.groups import DenseGroups
from megascore.parallel.axes import Shard
from megascore.parallel.placed import PlacedHook
from megascore.parallel.placed_iterative import PlacedIterativeHook
from megascore.sites.places import Place
from megascore.sites.requests import ScoreRequest

__all__ = [
    "MegatronBlockSimilarityHook",
    "MegatronIndependentChannelContributionHook",
    "MegatronIndependentKvHeadContributionHook",
    "MegatronIterativeChannelContributionHook",
    "MegatronL2NormHook",
    "MegatronLayerNormContributionHook",
    "build_hook",
]


class _OnRowParallelLinear(PlacedHook):
    """A hook at the input of a row-parallel linear layer, whose channels are the layer's inputs."""

    def put_on(self, linear: nn.Module) -> None:
        """Read place and groups from the layer. Not collective."""
        groups = DenseGroups.of(linear)
        self.put(place_row_parallel_input(linear, groups), groups.larger_than_one("tp", "cp", "dp"), _device(linear))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Add the activations of one forward pass: [S, B, this rank's channels]."""
        if self._placement is None:
            self.put_on(module)
        super().__call__(module, args, output)

    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; a layer with ``input_is_parallel=False`` is given all channels, of which its own count."""
        if self._placement is not None:
            inputs = _own_columns(inputs, self._placement.shard)
        super().observe(inputs, output, token_mask)  # type: ignore[safe-super]  # of the plain hook mixed in


class MegatronL2NormHook(_OnRowParallelLinear, L2NormHook):
    """`L2NormHook` at the input of a row-parallel linear layer; at other places, `put` says where."""


class MegatronIndependentChannelContributionHook(_OnRowParallelLinear, IndependentChannelContributionHook):
    """`IndependentChannelContributionHook` of a row-parallel linear layer."""

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Any = None) -> None:
        """Take the norms of this rank's columns of the weight."""
        super().__init__(linear_layer, activation_hooks_kwargs)
        self.put_on(linear_layer)


class MegatronIterativeChannelContributionHook(_OnRowParallelLinear, PlacedIterativeHook):
    """`IterativeChannelContributionHook` of a row-parallel linear layer.

    Used by itself a call is an iteration, as in the parent, and collective over the ranks that share the layer: all of
    them make the same number of calls. In a scoring run a step is an iteration.
    """

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any]) -> None:
        """Plan the iterations; the arguments are those of the parent."""
        super().__init__(linear_layer, activation_hooks_kwargs)
        self.put_on(linear_layer)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Make one iteration. Collective over the ranks that share the layer."""
        super().__call__(module, args, output)
        self.step()


class MegatronIndependentKvHeadContributionHook(PlacedHook, IndependentKvHeadContributionHook):
    """`IndependentKvHeadContributionHook` of the attention output projection.

    With fewer KV heads than tensor-parallel ranks the query heads of one KV head are spread over several ranks. Their
    outputs must be added before the norm is taken, so each forward pass then gathers the projection's input.
    """

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any] | None = None) -> None:
        """Factorize the weights of this rank's KV heads.

        Collective over the tensor axis where there are fewer KV heads than tensor-parallel ranks.

        Args:
            linear_layer: The projection.
            activation_hooks_kwargs: As the parent takes them: ``block_config`` with ``attention.num_key_value_heads``,
                and ``model``, whose attention that has this projection says the number, too. Without both the
                projection's own ``config`` has to, as ``num_query_groups``.

        Raises:
            HookStateError: nothing says how many KV heads there are, or two of these contradict each other.
            ModelError: heads can't share the projection's inputs equally.
        """
        groups = DenseGroups.of(linear_layer)
        total = place_row_parallel_input(linear_layer, groups).shard.total
        given = activation_hooks_kwargs or {}
        self._build_for(linear_layer, kv_heads_of_projection(linear_layer, given, total, groups.axis("tp").size))

    @classmethod
    def for_heads(cls, linear_layer: nn.Module, num_kv_heads: int) -> MegatronIndependentKvHeadContributionHook:
        """Return a hook for a projection of which ``num_kv_heads``, on all ranks, share the inputs equally.

        Collective over the tensor axis where there are fewer KV heads than tensor-parallel ranks.
        """
        hook = cls.__new__(cls)
        hook._build_for(linear_layer, num_kv_heads)
        return hook

    def _build_for(self, linear_layer: nn.Module, num_kv_heads: int) -> None:
        groups = DenseGroups.of(linear_layer)
        self._tensor_group = groups.larger_than_one("tp").get("tp")
        self._columns = place_row_parallel_input(linear_layer, groups).shard
        placement = place_kv_heads(num_kv_heads, groups)
        self._width = self._columns.total // placement.shard.total
        self._is_spread = self._columns.length < placement.shard.length * self._width
        layer: Any = linear_layer
        weight = whole_weight(layer.weight).detach()
        self._first_column = placement.shard.offset * self._width
        own = self._own_heads(weight, placement.shard.length)
        self._build(WeightAlone(own), placement.shard.length)
        self.put(placement, groups.larger_than_one("tp", "cp", "dp"), weight.device)

    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call. Collective over the tensor axis where KV heads are spread over its ranks."""
        super().observe(self._own_heads(inputs, len(self._weight_norm)), output, token_mask)

    def _own_heads(self, values: Tensor, num_heads: int) -> Tensor:
        """Return the columns [..., num_heads * width] of this rank's KV heads, whoever has them."""
        values = _own_columns(values, self._columns)
        if not self._is_spread:
            return values
        parts = [torch.empty_like(values) for _ in range(self._columns.total // self._columns.length)]
        dist.all_gather(parts, values.contiguous(), group=self._tensor_group)
        return torch.cat(parts, dim=-1).narrow(-1, self._first_column, num_heads * self._width)


class MegatronLayerNormContributionHook(PlacedHook, LayerNormContributionHook):
    """`LayerNormContributionHook` of a norm, with or without sequence parallelism."""

    def __init__(self, layernorm_layer: nn.Module, activation_hooks_kwargs: Any = None) -> None:
        """Read the number of features from the norm's weight."""
        super().__init__(layernorm_layer, activation_hooks_kwargs)
        groups = DenseGroups.of(layernorm_layer)
        weight: Any = layernorm_layer.weight
        # Megatron marks the weights of the norms that see only this rank's part of the sequence.
        placement = place_hidden_states(len(weight), bool(getattr(weight, "sequence_parallel", False)), groups)
        self.put(placement, groups.larger_than_one("tp", "cp", "dp"), weight.device)


class MegatronBlockSimilarityHook(PlacedHook, BlockSimilarityHook):
    """`BlockSimilarityHook` at a transformer layer; `put` says where."""


def build_hook(request: ScoreRequest, place: Place) -> PlacedHook:
    """Return the hook of one score at a place, not yet put there.

    Collective over the tensor axis for KV heads that are spread over it.
    """
    if request.target == "kv_heads":
        return MegatronIndependentKvHeadContributionHook(place.module)
    if request.method == "independent_contribution":
        return MegatronIndependentChannelContributionHook(place.module)
    if request.method == "iterative_contribution":
        return MegatronIterativeChannelContributionHook(place.module, request.iterative_settings())
    if request.method == "layer_norm_contribution":
        return MegatronLayerNormContributionHook(norm_module(place.module))
    return MegatronBlockSimilarityHook() if request.method == "block_similarity" else MegatronL2NormHook()


def _own_columns(values: Tensor, shard: Shard) -> Tensor:
    return values if values.shape[-1] == shard.length else values.narrow(-1, shard.offset, shard.length)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
