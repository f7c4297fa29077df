"""Fused kernels on a GPU: the numbers of PyTorch's own operators, whatever the strides; what they take is printed."""

from __future__ import annotations

import pytest
import torch
from torch.utils import benchmark

from megascore.kernels import pairs_of_rows
from megascore.kernels.fused_cosines import DTYPES, can_fuse
from tests.kernels.fused_cases import oracle


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (33, 4096), (5, 5000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_are_those_of_a_loop_in_float64(
    dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) + 3).to(dtype)
    y = (x + 0.1 * torch.randn(shape)).to(dtype)
    # Every other row of a wider matrix.
    there = torch.stack([y, torch.full_like(y, torch.nan)], dim=1).to(device)[:, 0]
    if not can_fuse(x.to(device), there):
        pytest.skip("triton is not installed")
    found = pairs_of_rows.sum_of_cosines(x.to(device), there).cpu()
    # Three float32 sums of one sign for each row: a few roundings of 6e-8.
    torch.testing.assert_close(found, oracle(x, y).sum(), rtol=1e-6, atol=0)


def test_what_the_fused_kernel_takes_beside_the_operators(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device=device)
    y = x + torch.randn_like(x)
    if not can_fuse(x, y):
        pytest.skip("triton is not installed")

    def median() -> float:
        timer = benchmark.Timer("f(x, y)", globals={"f": pairs_of_rows.sum_of_cosines, "x": x, "y": y})
        return float(timer.blocked_autorange(min_run_time=0.5).median)

    fused = median()
    monkeypatch.setattr(pairs_of_rows, "can_fuse", lambda x, y: False)
    own = median()
    gigabytes = 2 * x.numel() * x.itemsize / 1e9
    print(
        f"\nsum_of_cosines of [8192, 4096] bfloat16: fused {1e6 * fused:.0f} us ({gigabytes / fused:.0f} GB/s), "
        f"PyTorch's operators {1e6 * own:.0f} us"
    )
