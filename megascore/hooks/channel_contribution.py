"""IndependentChannelContributionHook: mean absolute activation times weight norm, for each input channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megascore.hooks.statistics import State, Statistic
from megascore.hooks.weights import WeightHook, weight_matrix
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["IndependentChannelContributionHook"]


class IndependentChannelContributionHook(
    WeightHook,
    method="independent_contribution",
    targets=("ffn", "shared_expert_ffn"),
    summary="mean absolute activation times the norm of the weight's column",
):
    """Scores the input channels of a linear layer: ``norm2(W[:, c]) * mean over tokens of abs(x[..., c])``."""

    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Any = None) -> None:
        """Take the norms of the weight's columns.

        Args:
            linear_layer: nn.Linear, or a layer with ``weight`` [E, C] and ``input_size``.
            activation_hooks_kwargs: Not used; callers that make all hooks alike pass it.
        """
        weight = weight_matrix(linear_layer, self._score_name(), may_be_shard=self.takes_shards)
        super().__init__(reductions.column_norms(weight))

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of absolute activations, and the weight's column norms."""
        return (*super().declare(num_channels), Statistic("sum_of_abs", (num_channels,), channel_dim=0))

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``inputs`` is [..., C]. Not collective."""
        self._begin_call(inputs, token_mask)
        self._state["sum_of_abs"] += reductions.abs_sum(inputs, token_mask)

    def compute(self, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score``, ``weight_norm`` and ``agg_channel_activations`` (mean times ``num_calls``), each [C]."""
        self._require_data(state)
        means = state["sum_of_abs"] / state["num_tokens"] * num_calls
        return {
            "score": state["weight_norm"] * means,
            "weight_norm": state["weight_norm"],
            "agg_channel_activations": means,
        }
