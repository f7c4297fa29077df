"""Tensor-parallel subclasses of the hooks: put on a module of Megatron-Core, they give the whole model's vector."""

from __future__ import annotations

from torch import Tensor, nn

from megascore.hooks import BlockSimilarityHook, L2NormHook
from megascore.mcore.groups import DenseGroups
from megascore.mcore.placement import place_row_parallel_input
from megascore.parallel.placed_hook import PlacedHook

__all__ = ["MegatronBlockSimilarityHook", "MegatronL2NormHook"]


class MegatronL2NormHook(PlacedHook, L2NormHook):
    """`L2NormHook` at the input of a row-parallel linear layer, for any parallel layout.

    Used by itself (``linear.register_forward_hook(MegatronL2NormHook())``) it reads groups and channels from the module
    at its first call; ``accumulate()`` is then collective over the ranks that share the module, and returns the
    scores of all ``input_size`` channels on each of them.
    """

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        """Add the activations of one forward pass; [S, B, C / tensor-parallel size]."""
        _put_on_linear(self, module)
        super().__call__(module, args, output)


class MegatronBlockSimilarityHook(PlacedHook, BlockSimilarityHook):
    """`BlockSimilarityHook` at a transformer layer, for any parallel layout; `put` says where."""


def _put_on_linear(hook: PlacedHook, module: nn.Module) -> None:
    if hook._placement is None:
        groups = DenseGroups.of(module)
        placement = place_row_parallel_input(module, groups)
        hook.put(placement, groups.larger_than_one("tp", "cp", "dp"), module.weight.device)  # type: ignore[arg-type]


HOOKS: dict[str, type[PlacedHook]] = {"l2_norm": MegatronL2NormHook, "block_similarity": MegatronBlockSimilarityHook}
"""The class that computes each method."""
