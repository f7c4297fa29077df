"""Scores: forward hooks that turn activations into importance scores. Needs PyTorch alone."""

from __future__ import annotations

from megascore.hooks.base import ForwardHook
from megascore.hooks.block_similarity import BlockSimilarityHook
from megascore.hooks.channel_contribution import IndependentChannelContributionHook
from megascore.hooks.iterative import IterativeChannelContributionHook
from megascore.hooks.kv_head import IndependentKvHeadContributionHook
from megascore.hooks.l2_norm import L2NormHook
from megascore.hooks.layer_norm import LayerNormContributionHook
from megascore.hooks.routed_l2_norm import RoutedL2NormHook
from megascore.hooks.router_weighted_norm import RouterWeightedNormHook
from megascore.hooks.span_similarity import SpanSimilarityHook
from megascore.hooks.statistics import Merge, State, Statistic
from megascore.hooks.without_layer import LossWithoutHook, OutputErrorHook

__all__ = [
    "BlockSimilarityHook",
    "ForwardHook",
    "IndependentChannelContributionHook",
    "IndependentKvHeadContributionHook",
    "IterativeChannelContributionHook",
    "L2NormHook",
    "LayerNormContributionHook",
    "LossWithoutHook",
    "Merge",
    "OutputErrorHook",
    "RoutedL2NormHook",
    "RouterWeightedNormHook",
    "SpanSimilarityHook",
    "State",
    "Statistic",
]
