"""BlockSimilarityHook: how much a transformer block changes the direction of its input."""

from __future__ import annotations

from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.kernels.exact import exact
from megascore.kernels.pairs_of_rows import sum_of_cosines

__all__ = ["BlockSimilarityHook"]


class BlockSimilarityHook(
    ForwardHook,
    method="block_similarity",
    targets=("layers",),
    summary="1 - mean over tokens of the cosine of the layer's input and output",
):
    """Scores a whole block: ``1 - mean over tokens of cos(block input, block output)``. Low: the block can go.

    A token whose input or output is all zeros has cosine 0.
    """

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of cosines; ``num_channels`` is 1, the block itself."""
        return (Statistic("sum_of_cosines", (num_channels,)),)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` and ``output`` are the block's hidden states, of the same shape, features last."""
        if inputs.shape != output.shape:
            raise HookStateError(
                f"{type(self).__name__} compares a block's input with its output, which must have one shape; "
                f"got {list(inputs.shape)} and {list(output.shape)}."
            )
        self._begin_call(inputs, token_mask, num_channels=1)
        self._state["sum_of_cosines"] += sum_of_cosines(inputs, output, token_mask)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [1]; ``num_calls`` has no part in it."""
        cls._require_data(state)
        return {"score": 1 - state["sum_of_cosines"] / state["num_tokens"]}
