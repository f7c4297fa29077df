"""Layers that were scored as spans: consecutive ones go together, or none of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascore.errors import PlanError
from megascore.hooks import SpanSimilarityHook

__all__ = ["check_span", "is_of_spans", "span_values"]


def is_of_spans(target: str, method: str) -> bool:
    """Tell whether a score of a layer is that of the span which begins with it."""
    measured = SpanSimilarityHook.measures
    assert measured is not None
    return target in measured.targets and method == measured.name


def span_values(values: Tensor, unseen: Sequence[int]) -> Tensor:
    """Return what lets the layers of the span with the lowest score go first.

    Args:
        values: The score of the span that begins with each layer, [layers] float64.
        unseen: The layers that begin no whole span: as many as a span has layers, but for one.

    Returns:
        [layers] float64, 0 for the layers of that span, and 1 for all others.
    """
    first = int(values[: len(values) - len(unseen)].argmin())
    found = torch.ones_like(values)
    found[first : first + len(unseen) + 1] = 0.0
    return found


def check_span(unseen: Sequence[int], num_layers: int, num_removed: int) -> None:
    """Refuse a plan that does not remove one whole span.

    Args:
        unseen: As of `span_values`.
        num_layers: Of the parent.
        num_removed: Layers that go.

    Raises:
        PlanError: naming both numbers.
    """
    span = len(unseen) + 1
    if num_removed != span:
        raise PlanError(
            f"layers were scored by span_similarity with span={span}, which says what {span} consecutive layers do "
            f"together, and the plan removes {num_removed}: ask for layers={num_layers - span}, score with "
            f"span: {num_removed}, or choose another method.layers."
        )
