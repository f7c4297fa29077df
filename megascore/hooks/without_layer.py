"""Scores of a layer by what the model does without it: the loss, and the final hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks.measured import MeasuredHook
from megascore.hooks.statistics import State, Statistic

__all__ = ["LossWithoutHook", "OutputErrorHook"]


class LossWithoutHook(
    MeasuredHook,
    method="loss_without",
    targets=("layers",),
    summary="mean loss of the model without the layer minus that of the whole model, in nats per predicted token",
):
    """Scores a layer by the rise of the loss without it: ``mean over predicted tokens of (nats without - nats)``.

    Negative where the model predicts better without the layer; low goes first all the same. Known as the greedy
    criterion of SLEB (arXiv:2402.09025) and of Shortened Llama (arXiv:2402.02834), taken once.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "num_tokens": "tokens",
        "num_calls": "calls",
        "nats_added": "nats_added",
        "num_predicted": "predicted",
    }

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the nats that come on top without the layer, and the predicted tokens; ``num_channels`` is 1."""
        return (Statistic("nats_added", (num_channels,)), Statistic("num_predicted", (), torch.int64))

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [1]; ``num_calls`` has no part in it.

        Raises:
            HookStateError: no token was predicted.
        """
        cls._require_data(state)
        if not int(state["num_predicted"]):
            raise HookStateError(
                "layers/loss_without: no token was predicted, as each document is one token: there is no loss. Give "
                "longer documents, or score layers by block_similarity."
            )
        return {"score": state["nats_added"] / state["num_predicted"]}


class OutputErrorHook(
    MeasuredHook,
    method="output_error",
    targets=("layers",),
    summary="squared error of the final hidden states of the model without the layer, over their squared norm",
):
    """Scores a layer by ``sum over tokens |h - h_without|^2 / sum over tokens |h|^2``.

    The hidden states are those that the last layer returns, before the final norm: every layer adds to them, so the
    error is in the units of what layers add. Layers whose hidden states are large at a few tokens weigh by them.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "num_tokens": "tokens",
        "num_calls": "calls",
        "squared_error": "squared_error",
        "squared_norm": "squared_norm",
    }

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sums of both squares; ``num_channels`` is 1, the layer itself."""
        return (Statistic("squared_error", (num_channels,)), Statistic("squared_norm", (num_channels,)))

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [1]; ``num_calls`` has no part in it. Final hidden states of zeros give no error: 0."""
        cls._require_data(state)
        tiny = torch.finfo(torch.float64).tiny
        return {"score": state["squared_error"] / state["squared_norm"].clamp(min=tiny)}
