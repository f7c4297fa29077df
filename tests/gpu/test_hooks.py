"""The hooks by themselves on a GPU: the CPU's results, no waiting for the device, bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megascore.hooks import ForwardHook, RoutedL2NormHook
from megascore.hooks.router_weighted_norm import RouterWeightedNormHook
from tests.gpu.conftest import sync_debug_mode
from tests.hooks.cases import CASES, NUM_CALLS, Case, random_calls
from tests.hooks.oracles import Call

NUM_CHANNELS, SHAPE = 768, (300, 4)
MEMORY_BOUND = 512 << 20
TOLERANCE = {
    # Only the order of additions differs.
    torch.float64: 1e-11,
    # As many float32 numbers added up in another order, and products likewise.
    torch.float32: 2e-5,
    # Activations are the same; a float32 factor beside bfloat16 is split in two, which keeps 2^-17 of it.
    torch.bfloat16: 5e-5,
}

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make_calls(case: Case, dtype: torch.dtype, masked: bool = False) -> tuple[nn.Module, list[Call]]:
    torch.manual_seed(0)
    module = case.make_module(NUM_CHANNELS, dtype).requires_grad_(False)
    return module, random_calls(module, NUM_CHANNELS, dtype, SHAPE, masked=masked)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@by_name
def test_a_gpu_gives_the_results_of_the_cpu(case: Case, dtype: torch.dtype, masked: bool, device: torch.device) -> None:
    module, calls = make_calls(case, dtype, masked)
    on_cpu, on_gpu = case.make_hook(module, NUM_CALLS), case.make_hook(module.to(device), NUM_CALLS)
    for x, y, mask in calls:
        on_cpu.observe(x, y, mask)
        on_gpu.observe(x.to(device), y.to(device), None if mask is None else mask.to(device))
    expected, results = on_cpu.to_dict(), on_gpu.to_dict()
    if case.iterative:
        # Ranks: near each other, two channels may change places.
        assert (results["score"] - expected["score"]).abs().float().mean() < 1
        return
    for name in expected.keys() - {"channels_importance_ascending"}:
        torch.testing.assert_close(results[name], expected[name], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@by_name
def test_a_hook_never_makes_the_host_wait(case: Case, device: torch.device) -> None:
    module, calls = make_calls(case, torch.bfloat16, masked=True)
    hook = case.make_hook(module.to(device), 2 * NUM_CALLS)
    # What is masked holds NaN, and is not masked in every call here.
    on_device = [(x.nan_to_num().to(device), y.nan_to_num().to(device), mask.to(device)) for x, y, mask in calls]
    # The first calls may load libraries, which waits.
    for x, y, mask in on_device[:2]:
        hook.observe(x, y, mask)
        hook.observe(x, y)
    torch.cuda.synchronize()
    with sync_debug_mode("error"):
        for x, y, mask in on_device[2:]:
            hook.observe(x, y, mask)
            hook.observe(x, y)
    if not case.iterative:
        assert torch.isfinite(hook.accumulate()).all()


@pytest.mark.parametrize("routed", [True, False], ids=["all experts", "one expert"])
def test_hooks_of_experts_never_make_the_host_wait(routed: bool, device: torch.device) -> None:
    hook: ForwardHook = RouterWeightedNormHook() if routed else RoutedL2NormHook()
    hook.allocate(8 if routed else NUM_CHANNELS, device)
    x = torch.randn(600, NUM_CHANNELS, device=device, dtype=torch.bfloat16)
    experts = torch.arange(600, device=device) // 75
    counts = torch.full((8,), 75)

    def call() -> None:
        # As the reader of Megatron's experts does, whose counts are on the CPU.
        numbers = torch.repeat_interleave(
            torch.arange(8, device=device), counts.to(device, non_blocking=True), output_size=600
        )
        hook.observe(numbers if routed else x, x)

    call()
    torch.cuda.synchronize()
    with sync_debug_mode("error"):
        call()
    if routed:
        expected = torch.stack([x[experts == n].double().norm(dim=1).mean() for n in range(8)])
    else:
        expected = (2 * x.double().square().sum(0)).sqrt()
    torch.testing.assert_close(hook.accumulate().double(), expected, rtol=1e-5, atol=0)


@by_name
def test_a_hook_takes_bounded_memory(case: Case, device: torch.device) -> None:
    """However many tokens a call has: here an activation of 1.5 GiB."""
    num_channels, num_tokens = 4096 * 3, 65536 + 3
    with torch.device(device):
        module = case.make_module(num_channels, torch.bfloat16).to(device).requires_grad_(False)
        hook = case.make_hook(module, 8)
        x = torch.randn(num_tokens, 1, num_channels, dtype=torch.bfloat16)
    assert x.nbytes > 3 * MEMORY_BOUND
    y = module(x)
    hook.observe(x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hook.observe(x, y)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < MEMORY_BOUND
