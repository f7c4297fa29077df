"""Memory that a call of each hook takes, as PyTorch's profiler counts it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from megascore.kernels import workspace
from tests.hooks.cases import CASES, Case


def extra_memory(function, *args: object) -> int:  # type: ignore[no-untyped-def]
    """Peak of what PyTorch allocates during a call, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function(*args)
    current = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_of_a_call_is_bounded_whatever_the_number_of_tokens(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_channels = 768
    module = case.make_module(num_channels, dtype) if case.norm else nn.Linear(num_channels, 512, bias=False).to(dtype)
    hook = case.make_hook(module, num_channels)
    # What a thread keeps counts, too: let it be allocated in the call.
    monkeypatch.setattr(workspace, "_kept", workspace._Kept())
    peaks = []
    for num_tokens in (32, 24_000):
        # 24,000 tokens in float32 are 74 MB: one copy would break the bound.
        x = torch.ones(num_tokens, 1, 1, dtype=dtype).expand(-1, -1, num_channels)
        y: Tensor = x if case.norm else x[..., :512]
        # In the second call the iterative hook has pruned channels, too.
        peaks.append(extra_memory(hook, module, (x,), y))
    assert 0 < sum(peaks) < 64 << 20
