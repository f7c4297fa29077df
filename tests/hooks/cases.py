"""All hook classes, each with a module, calls and its formula: a new class gets every shared test by one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.hooks import (
    BlockSimilarityHook,
    FluctuationHook,
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2L2Hook,
    L2MeanHook,
    L2NormHook,
    LayerNormContributionHook,
    MeanMeanHook,
    MomentsHook,
    QueryHeadContributionHook,
    VarianceHook,
    WandaHook,
    WeightNormHook,
)
from tests.hooks import oracles
from tests.hooks.oracles import Call

NUM_CHANNELS, NUM_OUTPUTS, NUM_KV_HEADS, NUM_CALLS = 12, 7, 3, 5


@dataclass(frozen=True)
class Case:
    name: str
    make_hook: Callable[[nn.Module, int], ForwardHook]
    """From the module and the number of calls."""
    formula: Callable[..., dict[str, Tensor]]
    norm: bool = False
    """The module is a norm: its output is as wide as its input."""
    iterative: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    channels_of: int = 1
    """The number of channels must be a multiple of this."""

    def make_module(self, num_channels: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Module:
        if self.norm:
            module: nn.Module = nn.LayerNorm(num_channels)
            nn.init.normal_(module.weight)
        else:
            module = nn.Linear(num_channels, NUM_OUTPUTS, bias=bias)
        return module.to(dtype)

    def expected(self, calls: list[Call], module: nn.Module) -> dict[str, Tensor]:
        return self.formula(calls, module, **self.options)


def make_kv_head(module: nn.Module, num_calls: int) -> ForwardHook:
    return IndependentKvHeadContributionHook.for_heads(module, NUM_KV_HEADS)


def make_iterative(module: nn.Module, num_calls: int, calibration: str | None = None) -> ForwardHook:
    settings = {"validation_full_iters": num_calls, "calibration_method": calibration}
    return IterativeChannelContributionHook(module, settings)


ITERATIVE = Case("iterative", make_iterative, oracles.iterative, iterative=True)
CALIBRATED = Case(
    "iterative, calibrated",
    partial(make_iterative, calibration="scale_by_magnitude"),
    oracles.iterative,
    iterative=True,
    options={"calibration": "scale_by_magnitude"},
)
L2_NORM = Case("l2_norm", lambda module, _: L2NormHook(), oracles.l2_norm)
INDEPENDENT = Case("independent", lambda module, _: IndependentChannelContributionHook(module), oracles.independent)
LAYER_NORM = Case("layer_norm", lambda module, _: LayerNormContributionHook(module, {}), oracles.layer_norm, norm=True)
KV_HEAD = Case(
    "kv_head", make_kv_head, oracles.kv_head, options={"num_kv_heads": NUM_KV_HEADS}, channels_of=NUM_KV_HEADS
)
SIMILARITY = Case("block_similarity", lambda module, _: BlockSimilarityHook(), oracles.block_similarity, norm=True)

QUERY_HEAD = Case(
    "query_head",
    lambda module, _: QueryHeadContributionHook.for_heads(module, NUM_KV_HEADS),
    oracles.kv_head,
    options={"num_kv_heads": NUM_KV_HEADS},
    channels_of=NUM_KV_HEADS,
)


def moments_case(hook: type[MomentsHook]) -> Case:
    method = hook.measures.name  # type: ignore[union-attr]
    return Case(method, lambda module, _: hook(module), oracles.moments, options={"method": method})


MOMENTS = [
    moments_case(hook)
    for hook in (MeanMeanHook, L2MeanHook, L2L2Hook, VarianceHook, WandaHook, FluctuationHook, WeightNormHook)
]
ADDITIVE = [L2_NORM, INDEPENDENT, LAYER_NORM, KV_HEAD, QUERY_HEAD, SIMILARITY, *MOMENTS]
CASES = [*ADDITIVE, ITERATIVE, CALIBRATED]

every_class = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_additive = pytest.mark.parametrize("case", ADDITIVE, ids=lambda case: case.name)


def random_calls(
    module: nn.Module,
    num_channels: int = NUM_CHANNELS,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (9, 4),
    num_calls: int = NUM_CALLS,
    masked: bool = False,
) -> list[Call]:
    """Calls of ``module`` on inputs whose channels differ in size, so that no two scores are near each other."""
    calls: list[Call] = []
    for _ in range(num_calls):
        x = (torch.randn(*shape, num_channels) * torch.logspace(-1, 1, num_channels)).to(dtype)
        with torch.no_grad():
            y = module(x)
        mask = None
        if masked:
            mask = torch.rand(shape) < 0.7
            x[~mask] = float("nan")
            y[~mask] = float("nan")
        calls.append((x, y, mask))
    return calls


def feed(hook: ForwardHook, calls: list[Call]) -> ForwardHook:
    """Give calls to a hook: as PyTorch does where there is no mask, which a module does not know."""
    for x, y, mask in calls:
        if mask is None:
            hook(None, (x,), y)  # type: ignore[arg-type]
        else:
            hook.observe(x, y, mask)
    return hook


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert list(actual) == list(expected)
    for key, value in actual.items():
        if value.is_floating_point():
            # Cosines lie within 1 of each other, so 1 - cosine is only as exact as 1 is.
            torch.testing.assert_close(value.double(), expected[key], rtol=rtol, atol=rtol)
        else:
            assert value.tolist() == expected[key].tolist(), key
