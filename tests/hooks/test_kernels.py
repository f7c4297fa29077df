"""The shared reductions and products against plain float64, and what memory a call takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from megascore.hooks import kernels
from megascore.hooks.products import product
from tests.hooks.cases import CASES, Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_views_cover_every_token_once_and_copy_nothing() -> None:
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    mask = torch.rand(2, 3, 4) < 0.5
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3), (2, 0, 1, 3)):
        for x, m in ((base, mask), (base[:, ::2], mask[:, ::2]), (base[..., 1:3], mask)):
            moved, moved_mask = x.permute(order), m.permute(order[:3])
            rows, flags = [], []
            for (tokens,), part in kernels.token_views([moved], moved_mask):
                assert tokens.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
                assert part is not None
                rows.append(tokens)
                flags.append(part)
            key = torch.cat(rows)[:, 0].argsort()
            expected_key = moved.reshape(-1, moved.shape[-1])[:, 0].argsort()
            assert torch.equal(torch.cat(rows)[key], moved.reshape(-1, moved.shape[-1])[expected_key])
            assert torch.equal(torch.cat(flags)[key], moved_mask.reshape(-1)[expected_key])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_absolute_values_are_exact_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(20000, 3).to(dtype)
    expected = x.double().abs().sum(0)
    torch.testing.assert_close(kernels.abs_sum(x), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(kernels.abs_sum_of_samples(x[:, None])[0], expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_products_are_neither_rounded_nor_clipped(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 300).to(dtypes[0]), torch.randn(300, 50).to(dtypes[1]) * 3000
    result = product(x, weight)
    expected = x.double() @ weight.double()
    assert result.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    # 2^-17 for a factor in two parts; a product rounded to bfloat16 is off by 2e-3.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * float(expected.norm(dim=1).max()))


def test_products_leave_the_process_settings_as_they_are() -> None:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this PyTorch has no setting for the precision of matrix products on a CPU")
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    product(torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


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
def test_extra_memory_of_a_call_is_bounded_whatever_the_number_of_tokens(case: Case, dtype: torch.dtype) -> None:
    num_channels = 768
    module = case.make_module(num_channels, dtype) if case.norm else nn.Linear(num_channels, 512, bias=False).to(dtype)
    hook = case.make_hook(module, num_channels)
    for num_tokens in (32, 24_000):
        # 24,000 tokens in float32 are 74 MB: one copy would break the bound.
        x = torch.ones(num_tokens, 1, 1, dtype=dtype).expand(-1, -1, num_channels)
        y: Tensor = x if case.norm else x[..., :512]
        # In the second call the iterative hook has pruned channels, too.
        peak = extra_memory(hook, module, (x,), y)
    assert peak < 64 << 20
    assert peak > 0
