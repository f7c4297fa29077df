"""Score of several consecutive layers together: how much they change the direction of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megascore.errors import ConfigError
from megascore.hooks.measured import MeasuredHook
from megascore.hooks.statistics import Merge, State, Statistic

__all__ = ["SpanSimilarityHook"]

SPAN = 4
"""Layers of a span where nothing is said."""


class SpanSimilarityHook(
    MeasuredHook,
    method="span_similarity",
    targets=("layers",),
    summary="1 - mean over tokens of the cosine of the layer's input and the output of the last of `span` layers",
    options=("span",),
):
    """Scores the span of layers that begins with a layer: ``1 - mean over tokens of cos(its input, its output)``.

    Of arXiv:2403.17887, which takes the angle, whose order is the same. The last ``span - 1`` layers begin no whole
    span: no token is counted for them, and the score file calls them unseen. A token whose input or output is all
    zeros has cosine 0.
    """

    columns: ClassVar[Mapping[str, str]] = {
        "num_tokens": "span_tokens",
        "num_calls": "span_calls",
        "sum_of_cosines": "cosines",
    }

    def __init__(self, span: int = SPAN) -> None:
        """Start with no data.

        Args:
            span: Layers of a span.
        """
        super().__init__()
        self.span = span

    @classmethod
    def at(cls, module: nn.Module, num_units: int, options: Mapping[str, Any]) -> SpanSimilarityHook:
        """Return a hook for a layer; see `HasMethod.at`."""
        return cls(cls.span_of(options))

    @classmethod
    def span_of(cls, options: Mapping[str, Any]) -> int:
        """Return how many layers a span has, by the options of an entry of ``scores``, checked."""
        return int(options.get("span", SPAN))

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a span that is no whole number from 1 on.

        Raises:
            ConfigError: naming what came.
        """
        span = options.get("span", SPAN)
        if isinstance(span, bool) or not isinstance(span, int) or span < 1:
            raise ConfigError(
                f"layers/span_similarity: span is {span!r}, expected a whole number of layers, 1 or more."
            )

    def settings(self) -> dict[str, Any]:
        """Return the span."""
        return {"span": self.span}

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        """Return the sum of cosines, and the span, without which two files might be merged that have other ones.

        ``num_channels`` is 1, the layer with which the span begins.
        """
        return (
            Statistic("sum_of_cosines", (num_channels,)),
            Statistic("span", (), torch.int64, merge=Merge.REPLICATED),
        )

    def allocate(self, num_channels: int, device: torch.device | str) -> None:
        """Allocate as every hook does; the span is there from the start."""
        fresh = not self._state
        super().allocate(num_channels, device)
        if fresh:
            self._state["span"].fill_(self.span)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        """Return ``score`` [1]; ``num_calls`` has no part in it."""
        cls._require_data(state)
        return {"score": 1 - state["sum_of_cosines"] / state["num_tokens"]}
