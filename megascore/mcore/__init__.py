"""Megatron-Core: the only room of megascore that imports it. Imported only where Megatron is in use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megascore.mcore.cpu.without_triton import triton_stand_in

__all__ = [
    "MegatronBlockSimilarityHook",
    "MegatronIndependentChannelContributionHook",
    "MegatronIndependentKvHeadContributionHook",
    "MegatronIterativeChannelContributionHook",
    "MegatronL2NormHook",
    "MegatronLayerNormContributionHook",
    "MegatronRoutedL2NormHook",
    "MegatronRouterWeightedNormHook",
    "capture_layer_inputs",
]


@contextmanager
def _importing_megatron() -> Iterator[None]:
    """Keep Megatron's import quiet, and short where there is no CUDA.

    On import it warns of its own deprecations, and that apex and Transformer Engine, which are optional, are not there.
    And it wraps its fused kernels in torch.compile, which loads a compiler that takes as long as all the rest, and that
    nobody needs for scoring on a CPU.
    """
    compile_before = torch.compile

    def leave_alone(function: Any = None, **_: Any) -> Any:
        return (lambda inner: inner) if function is None else function

    with warnings.catch_warnings(), triton_stand_in():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            setattr(torch, "compile", leave_alone)  # noqa: B010 - mypy takes no assignment to a function
        try:
            yield
        finally:
            setattr(torch, "compile", compile_before)  # noqa: B010


with _importing_megatron():
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.pipeline_parallel  # noqa: F401

from megascore.mcore.pipeline.layer_inputs import capture_layer_inputs  # noqa: E402
from megascore.mcore.sites.hooks import (  # noqa: E402
    MegatronBlockSimilarityHook,
    MegatronIndependentChannelContributionHook,
    MegatronIndependentKvHeadContributionHook,
    MegatronIterativeChannelContributionHook,
    MegatronL2NormHook,
    MegatronLayerNormContributionHook,
    MegatronRoutedL2NormHook,
    MegatronRouterWeightedNormHook,
)
