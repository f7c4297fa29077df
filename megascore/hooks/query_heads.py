"""QueryHeadContributionHook: what each query head adds to the attention output."""

from __future__ import annotations

from megascore.hooks.kv_head import IndependentKvHeadContributionHook

__all__ = ["QueryHeadContributionHook"]


class QueryHeadContributionHook(
    IndependentKvHeadContributionHook,
    method="independent_contribution",
    targets=("attention_heads",),
    summary="mean norm of what the head adds to the output",
):
    """Scores query heads: ``mean over tokens of norm2(W_h x_h)``, x_h and W_h being the head's slices.

    It is `IndependentKvHeadContributionHook` with a query head in place of all that share a KV head.
    """

    units_are_heads = True
