"""The shared reductions and products against plain float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megascore.hooks import IndependentChannelContributionHook, L2NormHook
from megascore.kernels import reductions
from megascore.kernels.products import Product, product
from megascore.kernels.reductions import Moment

pytestmark = pytest.mark.fast

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_views_cover_every_token_once_and_copy_nothing() -> None:
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    mask = torch.rand(2, 3, 4) < 0.5
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3), (2, 0, 1, 3)):
        for x, m in ((base, mask), (base[:, ::2], mask[:, ::2]), (base[..., 1:3], mask)):
            moved, moved_mask = x.permute(order), m.permute(order[:3])
            rows, flags = [], []
            for (tokens,), part in reductions.token_views([moved], moved_mask):
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
    torch.testing.assert_close(reductions.abs_sum(x), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(
        reductions.moments_of_samples(x[:, None], None, (Moment.ABS,))[0][0], expected, rtol=5e-7, atol=0
    )


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_products_are_neither_rounded_nor_clipped(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 300).to(dtypes[0]), torch.randn(300, 50).to(dtypes[1]) * 3000
    result = product(x, weight)
    expected = x.double() @ weight.double()
    assert result.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    # 2^-17 for a factor in two parts; a product rounded to bfloat16 is off by 2e-3.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * float(expected.norm(dim=1).max()))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_products_can_be_added_to_what_is_there(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    multiply = Product(*dtypes, torch.device("cpu"))
    x, weight = torch.randn(40, 300).to(dtypes[0]), torch.randn(300, 50).to(dtypes[1])
    kept = [factor.to(best) for factor, best in zip((x, weight), multiply.best_dtypes, strict=True)]
    out = torch.full((40, 50), float("nan"), dtype=multiply.dtype)
    once = multiply(*kept, out)
    assert torch.equal(once, multiply(x, weight))
    twice = multiply(*kept, once, accumulate=True)
    torch.testing.assert_close(twice, 2 * multiply(x, weight))


def test_columns_are_taken_in_order_and_widened() -> None:
    matrix = torch.randn(700, 33).bfloat16()
    columns = torch.randperm(33)[:20]
    for dtype in (torch.bfloat16, torch.float32):
        taken = reductions.take_columns(matrix, columns, torch.empty(700, 20, dtype=dtype))
        assert torch.equal(taken, matrix[:, columns].to(dtype))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_sums_do_not_depend_on_what_the_process_chose_for_its_products(precision: str) -> None:
    x = torch.rand(600, 512)
    linear = nn.Linear(512, 256, bias=False).requires_grad_(False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        hooks = [L2NormHook(), IndependentChannelContributionHook(linear)]
        for hook in hooks:
            hook(linear, (x,), linear(x))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    means = x.double().abs().mean(0)
    # One thread adds the 600 tokens of a channel in one float32 sum: up to 600 roundings of 6e-8, of which most cancel.
    torch.testing.assert_close(hooks[0].accumulate().double(), means, rtol=3e-6, atol=0)
    expected = means * linear.weight.double().norm(dim=0)
    torch.testing.assert_close(hooks[1].accumulate().double(), expected, rtol=3e-6, atol=0)


def test_products_leave_the_process_settings_as_they_are() -> None:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this PyTorch has no setting for the precision of matrix products on a CPU")
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    product(torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
