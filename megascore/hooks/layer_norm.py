"""LayerNormContributionHook: mean absolute output of a norm, for each feature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks import published
from megascore.hooks.base import ForwardHook
from megascore.hooks.statistics import State, Statistic
from megascore.hooks.weights import WeightHook, whole_weight
from megascore.kernels import reductions
from megascore.kernels.exact import exact

__all__ = ["LayerNormContributionHook"]


class LayerNormContributionHook(
    WeightHook, method="layer_norm_contribution", targets=("hidden_size",), summary="mean absolute output of the norm"
):
    """Scores the features of a normalization layer: ``mean over tokens of abs(output[..., c])``."""

    def __init__(self, layernorm_layer: nn.Module, activation_hooks_kwargs: Any = None) -> None:
        """Read the number of features from the layer's weight.

        Args:
            layernorm_layer: A layer with a ``weight`` [C].
            activation_hooks_kwargs: Not used.
        """
        weight = getattr(layernorm_layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            found = f"one of shape {list(weight.shape)}" if isinstance(weight, Tensor) else "none"
            raise HookStateError(
                f"{self._score_name()} takes a norm layer with a weight [features]; {layernorm_layer} has {found}."
            )
        super().__init__(whole_weight(weight).detach().double().abs())

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of absolute outputs, and the norms of the layer's weights."""
        return (*super().declare(num_channels), Statistic("sum_of_abs", (num_channels,), channel_dim=0))

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        """Add one call; ``output`` is [..., C], ``inputs`` is not used. Not collective."""
        self._begin_call(output, token_mask)
        self._state["sum_of_abs"] += reductions.abs_sum(output, token_mask)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [C] (the mean times ``num_calls``) and ``channels_importance_ascending`` [C] int64."""
        cls._require_data(state)
        score = state["sum_of_abs"] / state["num_tokens"] * num_calls
        return {"score": score, "channels_importance_ascending": torch.argsort(score, stable=True)}

    @classmethod
    def dump_activations_logs(
        cls, activation_hooks: Mapping[str, ForwardHook], activations_log_dir: str | Path, args: Any
    ) -> None:
        """Write what every hook writes, and on rank 0 the ranking over all norms: ``channel_importance_results.json``.

        Collective over the world where torch.distributed is initialised: returns when all ranks have written.
        """
        super().dump_activations_logs(activation_hooks, activations_log_dir, args)
        published.dump_channel_importance(activation_hooks, Path(activations_log_dir), args)
