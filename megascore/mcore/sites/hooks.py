"""Tensor-parallel forms of the hooks: put on a module of Megatron-Core, they give the whole model's scores.

Each can be used by itself (``linear.register_forward_hook(MegatronL2NormHook())``): it reads groups and channels from
its module, and ``accumulate()``, ``to_dict()`` and ``state_dict()`` are then collective over the ranks that share the
module, and return the whole result on each of them. On a model that isn't parallel each equals its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megascore.hooks import (
    BlockSimilarityHook,
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
    RoutedL2NormHook,
    RouterWeightedNormHook,
)
from megascore.mcore.sites.kv_heads import KvHeads
from megascore.mcore.sites.placement import own_columns, place_hidden_states, place_row_parallel_input
from megascore.mcore.world.groups import DenseGroups
from megascore.parallel.axes import Placement
from megascore.parallel.forms import placed
from megascore.parallel.placed import PlacedHook
from megascore.parallel.placed_iterative import PlacedIterativeHook

__all__ = [
    "MegatronBlockSimilarityHook",
    "MegatronIndependentChannelContributionHook",
    "MegatronIndependentKvHeadContributionHook",
    "MegatronIterativeChannelContributionHook",
    "MegatronL2NormHook",
    "MegatronLayerNormContributionHook",
    "MegatronRoutedL2NormHook",
    "MegatronRouterWeightedNormHook",
]


class _OnModule(PlacedHook):
    """Mixed in before the parallel form of a hook: it finds its place by itself, from its module."""

    _place: ClassVar[Callable[[nn.Module, DenseGroups], Placement]]

    def __init__(self, module: nn.Module | None = None, activation_hooks_kwargs: Any = None) -> None:
        """Take the arguments of the parent, and the place from the module; without one, from the first call's.

        Args:
            module: The layer.
            activation_hooks_kwargs: Of the parent.
        """
        parent: Any = super()
        parent.__init__(module, activation_hooks_kwargs)
        if module is not None:
            self.put_on(module)

    def put_on(self, module: nn.Module) -> None:
        """Read place and groups from the module. Not collective."""
        groups = DenseGroups.of(module)
        self.put(type(self)._place(module, groups), groups.larger_than_one("tp", "cp", "dp"), _device(module))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Add the activations of one forward pass: [S, B, this rank's channels].

        Collective for an iterative score, of which each call is an iteration: over the ranks that share the layer, all
        of which make the same number of calls.
        """
        if self._placement is None:
            self.put_on(module)
        assert self._placement is not None
        # A layer with input_is_parallel=False is given all channels, of which its own count.
        super().__call__(module, (own_columns(args[0], self._placement.shard), *args[1:]) if args else args, output)
        if isinstance(self, PlacedIterativeHook):
            self.step()


def _norm_output(norm: nn.Module, groups: DenseGroups) -> Placement:
    weight: Any = norm.weight
    # Megatron marks the weights of the norms that see only this rank's part of the sequence.
    return place_hidden_states(len(weight), bool(getattr(weight, "sequence_parallel", False)), groups)


def _megatron(hook: type[ForwardHook], place: Callable[[nn.Module, DenseGroups], Placement] | None = None) -> Any:
    """Return the public form of a hook: `placed`, and where ``place`` tells its place from a module, by itself."""
    form = placed(hook)
    where = "`put` says where it is" if place is None else "it reads its place from its module"
    own = {"__doc__": f"`{hook.__name__}` in any parallel layout; {where}.", "__module__": __name__}
    if place is None:
        return type(f"Megatron{hook.__name__}", (form,), own)
    return type(f"Megatron{hook.__name__}", (_OnModule, form), {**own, "_place": staticmethod(place)})


MegatronL2NormHook = _megatron(L2NormHook, place_row_parallel_input)
MegatronIndependentChannelContributionHook = _megatron(IndependentChannelContributionHook, place_row_parallel_input)
MegatronIterativeChannelContributionHook = _megatron(IterativeChannelContributionHook, place_row_parallel_input)
MegatronLayerNormContributionHook = _megatron(LayerNormContributionHook, _norm_output)
MegatronBlockSimilarityHook = _megatron(BlockSimilarityHook)
MegatronRoutedL2NormHook = _megatron(RoutedL2NormHook)
MegatronRouterWeightedNormHook = _megatron(RouterWeightedNormHook)


class MegatronIndependentKvHeadContributionHook(placed(IndependentKvHeadContributionHook)):  # type: ignore[misc]
    """`IndependentKvHeadContributionHook` of the attention output projection; see `KvHeads` for how it is spread."""

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Mapping[str, Any] | None = None) -> None:
        """Factorize the weights of this rank's KV heads.

        Collective over the tensor axis where there are fewer KV heads than tensor-parallel ranks.

        Args:
            linear_layer: The projection, whose ``config`` has ``num_query_groups``.
            activation_hooks_kwargs: Not used; callers that make all hooks alike pass it.
        """
        config: Any = linear_layer.config
        groups = DenseGroups.of(linear_layer)
        self._heads = KvHeads(linear_layer, int(config.num_query_groups), groups)
        self._build(self._heads.module(), self._heads.placement.shard.length)
        self.put(self._heads.placement, groups.larger_than_one("tp", "cp", "dp"), _device(linear_layer))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Add one call. Collective over the tensor axis where KV heads are spread over its ranks."""
        super().__call__(module, (self._heads.own(args[0]), *args[1:]) if args else args, output)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
