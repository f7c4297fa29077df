"""IndependentChannelContributionHook: mean absolute activation times weight norm, for each input channel."""

from __future__ import annotations

from torch import Tensor

from megascore.hooks.moments import MomentsHook
from megascore.hooks.statistics import State

__all__ = ["IndependentChannelContributionHook"]


class IndependentChannelContributionHook(
    MomentsHook,
    method="independent_contribution",
    targets=("ffn", "shared_expert_ffn"),
    summary="mean absolute activation times the norm of the weight's column",
):
    """Scores the input channels of a linear layer: ``norm2(W[:, c]) * mean over tokens of abs(x[..., c])``.

    The layer is nn.Linear, or one with ``weight`` [E, C] and ``input_size``.
    """

    keeps = ("weight_norm", "sum_of_abs")

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score``, ``weight_norm`` and ``agg_channel_activations`` (mean times ``num_calls``), each [C]."""
        cls._require_data(state)
        means = state["sum_of_abs"] / state["num_tokens"] * num_calls
        return {
            "score": state["weight_norm"] * means,
            "weight_norm": state["weight_norm"],
            "agg_channel_activations": means,
        }
