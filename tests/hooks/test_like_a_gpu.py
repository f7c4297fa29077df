"""Hooks as they are on a GPU, as far as it can be told without one: no waiting, bounded memory, types that fit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megascore.hooks import ForwardHook, RoutedL2NormHook
from megascore.hooks.router_weighted_norm import RouterWeightedNormHook
from megascore.parallel.axes import Axis, Placement, Role, Shard
from megascore.parallel.placed_iterative import PlacedIterativeHook
from tests.hooks.cases import CASES, Case
from tests.hooks.like_a_gpu import ELSEWHERE, Watch, like_a_gpu

NUM_CHANNELS, SHAPE, NUM_CALLS = 768, (300, 4), 6
MEMORY_BOUND = 512 << 20

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("operation", ["item", "bool", "mask", "to host", "from host", "nonzero"])
def test_the_watch_sees_what_waits(operation: str) -> None:
    with Watch() as watch:
        x = torch.zeros(3, device=ELSEWHERE)
        try:
            {
                "item": lambda: x.sum().item(),
                "bool": lambda: bool(x.any()),
                "mask": lambda: x[x > 0],
                "to host": lambda: x.cpu(),
                "from host": lambda: torch.zeros(3).to(ELSEWHERE),
                "nonzero": lambda: (x > 0).nonzero(),
            }[operation]()
        except (RuntimeError, NotImplementedError):
            # A tensor without content can't tell.
            pass
    assert watch.waits


TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "weights"), TYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@by_name
def test_a_hook_runs_on_a_gpu_without_waiting(
    case: Case, masked: bool, dtype: torch.dtype, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with like_a_gpu(monkeypatch):
        with torch.device(ELSEWHERE):
            module = case.make_module(NUM_CHANNELS, weights)
            hook = case.make_hook(module, NUM_CALLS)
            x = torch.randn(*SHAPE, NUM_CHANNELS).to(dtype)
            y = torch.randn(*SHAPE, NUM_CHANNELS if case.norm else len(module.weight)).to(dtype)
            mask = torch.ones(SHAPE, dtype=torch.bool) if masked else None
        with Watch() as watch:
            for _ in range(NUM_CALLS // 2):
                hook.observe(x, y, mask)
                # As Hugging Face models have it, seen sequence first.
                hook.observe(x.transpose(0, 1), y.transpose(0, 1), None if mask is None else mask.T)
    assert watch.waits == []


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("routed", [True, False], ids=["all experts", "one expert"])
def test_hooks_of_experts_run_on_a_gpu_without_waiting(
    routed: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with like_a_gpu(monkeypatch):
        hook: ForwardHook = RouterWeightedNormHook() if routed else RoutedL2NormHook()
        hook.allocate(8 if routed else NUM_CHANNELS, ELSEWHERE)
        with torch.device(ELSEWHERE):
            x = torch.randn(600, NUM_CHANNELS, dtype=torch.bfloat16)
            experts = torch.arange(600) // 75
            mask = torch.ones(600, dtype=torch.bool) if masked else None
        with Watch() as watch:
            hook.observe(experts if routed else x, x, mask)
    assert watch.waits == []


@by_name
def test_memory_on_a_gpu_is_bounded_whatever_the_number_of_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for num_tokens in (1 << 16, 1 << 17):
        with like_a_gpu(monkeypatch), torch.device(ELSEWHERE):
            module = case.make_module(4096 * 3, torch.bfloat16)
            hook = case.make_hook(module, 8)
            x = torch.empty(num_tokens, 1, 4096 * 3, dtype=torch.bfloat16)
            y = torch.empty(num_tokens, 1, 4096 * 3 if case.norm else len(module.weight), dtype=torch.bfloat16)
            for _ in range(2):
                hook.observe(x, y)
            with Watch() as watch:
                # Seen before, so that it is no memory of the call's.
                x.view(-1), y.view(-1), module.weight.view(-1)
                before = watch.in_use
                hook.observe(x, y)
        peaks.append(watch.peak - before)
    assert peaks[0] < MEMORY_BOUND
    # Of each token one number, such as its norm, may be kept.
    assert peaks[1] < peaks[0] + 64 * (1 << 16)


def test_nccl_is_given_contiguous_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with a float32 weight is half of a wider one on a GPU, and NCCL refuses a view with gaps."""
    given: list[bool] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: given.append(tensor.is_contiguous()))
    with like_a_gpu(monkeypatch), torch.device(ELSEWHERE):
        linear = nn.Linear(64, 32, bias=False)
        hook = PlacedIterativeHook(linear, {"validation_full_iters": 2, "calibration_method": None})
        axis = Axis("tp", 0, 2)
        hook.put(Placement(Shard(0, 64, 128), ((axis, Role.SHARD),)), {}, ELSEWHERE)
        hook._groups = {"tp": None}  # type: ignore[dict-item]
        hook._pruned_index, hook._kept_index = torch.arange(8), torch.arange(8, 64)
        monkeypatch.setattr(hook, "_num_pruned", lambda: 16)
        x = torch.empty(20, 1, 64, dtype=torch.bfloat16)
        hook.observe(x, torch.empty(20, 1, 32, dtype=torch.bfloat16))
    assert given == [True]
