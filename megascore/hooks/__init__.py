"""Scores: forward hooks that turn activations into importance scores. Needs PyTorch alone."""

from __future__ import annotations

from megascore.hooks.base import ForwardHook
from megascore.hooks.block_similarity import BlockSimilarityHook
from megascore.hooks.channel_contribution import IndependentChannelContributionHook
from megascore.hooks.iterative import IterativeChannelContributionHook
from megascore.hooks.kv_head import IndependentKvHeadContributionHook
from megascore.hooks.layer_norm import LayerNormContributionHook
from megascore.hooks.moment_methods import (
    FluctuationHook,
    L2L2Hook,
    L2MeanHook,
    L2NormHook,
    MeanMeanHook,
    RoutedL2NormHook,
    RoutedMeanHook,
    VarianceHook,
    WandaHook,
    WeightNormHook,
)
from megascore.hooks.moments import MomentsHook
from megascore.hooks.output_variance import OutputVarianceHook
from megascore.hooks.query_heads import QueryHeadContributionHook
from megascore.hooks.random_order import RandomHook
from megascore.hooks.router_weighted_norm import ExpertFrequencyHook, OutputNormHook, RouterWeightedNormHook
from megascore.hooks.span_similarity import SpanSimilarityHook
from megascore.hooks.statistics import Merge, State, Statistic
from megascore.hooks.taylor import HeadTaylorHook, TaylorHook
from megascore.hooks.without_layer import LossWithoutHook, OutputErrorHook

__all__ = [
    "BlockSimilarityHook",
    "ExpertFrequencyHook",
    "FluctuationHook",
    "ForwardHook",
    "HeadTaylorHook",
    "IndependentChannelContributionHook",
    "IndependentKvHeadContributionHook",
    "IterativeChannelContributionHook",
    "L2L2Hook",
    "L2MeanHook",
    "L2NormHook",
    "LayerNormContributionHook",
    "LossWithoutHook",
    "MeanMeanHook",
    "Merge",
    "MomentsHook",
    "OutputErrorHook",
    "OutputNormHook",
    "OutputVarianceHook",
    "QueryHeadContributionHook",
    "RandomHook",
    "RoutedL2NormHook",
    "RoutedMeanHook",
    "RouterWeightedNormHook",
    "SpanSimilarityHook",
    "State",
    "Statistic",
    "TaylorHook",
    "VarianceHook",
    "WandaHook",
    "WeightNormHook",
]
