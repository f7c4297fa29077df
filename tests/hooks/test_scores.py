"""Every class against its formula in float64, for the shapes and types that models have. Pure, seconds."""

from __future__ import annotations

import pytest
import torch

from megascore.hooks import (
    ExpertFrequencyHook,
    OutputNormHook,
    OutputVarianceHook,
    RandomHook,
    RoutedL2NormHook,
    RoutedMeanHook,
    RouterWeightedNormHook,
)
from megascore.hooks.registry import methods
from megascore.kernels import reductions
from tests.hooks.cases import (
    CASES,
    ITERATIVE,
    SIMILARITY,
    Case,
    assert_same,
    every_additive,
    every_class,
    feed,
    random_calls,
)

pytestmark = pytest.mark.fast

# Inputs of any type are exact in float32, where tokens are added up some tens at a time: a few roundings of 6e-8.
RTOL = 2e-6
# Products of float32 matrices, or of bfloat16 ones in two parts (2^-17), round each output.
RTOL_PRODUCTS = 1e-5

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def tolerance(case: Case) -> float:
    return RTOL_PRODUCTS if case.name == "kv_head" else RTOL


def check(case: Case, num_channels: int = 12, num_calls: int = 5, bias: bool = True, **options: object) -> None:
    torch.manual_seed(num_channels)
    dtype = options.get("dtype", torch.float32)
    module = case.make_module(num_channels, dtype, bias=bias)  # type: ignore[arg-type]
    calls = random_calls(module, num_channels, num_calls=num_calls, **options)  # type: ignore[arg-type]
    hook = feed(case.make_hook(module, num_calls), calls)
    assert_same(hook.to_dict(), case.expected(calls, module), tolerance(case))
    assert torch.equal(hook.accumulate(), hook.to_dict()["score"])


@every_class
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_score_is_the_formula_in_float64(case: Case, dtype: torch.dtype, bias: bool) -> None:
    check(case, dtype=dtype, bias=bias)


@every_class
@every_dtype
def test_masked_tokens_count_nothing_whatever_they_hold(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype=dtype, masked=True)


@every_class
@pytest.mark.parametrize("shape", [(33, 1), (1, 5), (40,), (1, 1)], ids=str)
def test_shape_of_the_input_is_free(case: Case, shape: tuple[int, ...]) -> None:
    check(case, shape=shape)
    if shape != (1, 1):
        check(case, shape=shape, masked=True)


@every_class
@pytest.mark.parametrize("num_channels", [1, 3, 30])
def test_number_of_channels_is_free(case: Case, num_channels: int) -> None:
    check(case, num_channels * case.channels_of)


@pytest.mark.parametrize("case", [case for case in CASES if case.iterative], ids=lambda case: case.name)
@pytest.mark.parametrize(("num_channels", "num_calls"), [(4, 10), (10, 4), (6, 6), (1, 3), (3, 1)])
def test_iterations_may_be_more_or_fewer_than_channels(case: Case, num_channels: int, num_calls: int) -> None:
    check(case, num_channels, num_calls=num_calls)


@every_class
def test_strides_of_the_input_do_not_matter(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    plain = random_calls(module, shape=(8, 4))
    expected = feed(case.make_hook(module, 5), plain).to_dict()
    layouts = {
        "batch first, transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels not contiguous": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "every second sample of a larger tensor": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "part of the channels of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "turned around in both": lambda x: x.repeat_interleave(2, 0)[::2].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, relayout in layouts.items():
        calls = [(relayout(x), relayout(y), None) for x, y, _ in plain]
        result = feed(case.make_hook(module, 5), calls).to_dict()  # type: ignore[arg-type]
        for key, value in result.items():
            torch.testing.assert_close(value, expected[key], rtol=RTOL, atol=RTOL, msg=f"{name}: {key}")


@every_additive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_samples_in_other_batches_give_the_same_mean(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module = case.make_module(12, dtype)
    [(x, y, mask)] = random_calls(module, dtype=dtype, shape=(50, 12), num_calls=1, masked=True)
    assert mask is not None
    scores = []
    for sizes in ([12], [5, 7], [1] * 12, [3, 0, 9]):
        parts = zip(x.split(sizes, 1), y.split(sizes, 1), mask.split(sizes, 1), strict=True)
        hook = feed(case.make_hook(module, 1), list(parts))
        scores.append(hook.compute(hook.merged_state())["score"])
    # The bound that score files promise; a variance is the difference of two sums, which may be several times as large.
    rtol = 1e-5 if case.name in ("variance", "fluctuation") else 1e-6
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=rtol, atol=1e-6 if case is SIMILARITY else 0)


@every_class
def test_scratch_smaller_than_the_data_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 700):
        monkeypatch.setattr(reductions, "CPU_SCRATCH_BYTES", size)
        monkeypatch.setattr("megascore.hooks.contributions.CHUNK_BYTES", size)
        monkeypatch.setattr("megascore.hooks.contributions.BLOCK_BYTES", size)
        monkeypatch.setattr("megascore.hooks.kv_head.CHUNK_BYTES", size)
        check(case)
        check(case, masked=True)


def test_triangular_blocks_of_a_wide_head_are_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megascore.hooks.kv_head.MIN_BLOCK_ROWS", 2)
    kv_head = next(case for case in CASES if case.name == "kv_head")
    for dtype in (torch.float32, torch.bfloat16):
        check(kv_head, 30, dtype=dtype)


def test_ties_go_to_the_smaller_channel() -> None:
    torch.manual_seed(0)
    module = ITERATIVE.make_module(6, torch.float32)
    with torch.no_grad():
        module.weight.copy_(module.weight[:, :1].expand(-1, 6))
    x = torch.randn(7, 1, 1).expand(7, 2, 6)
    hook = feed(ITERATIVE.make_hook(module, 2), [(x, module(x), None)] * 2)
    assert hook.to_dict()["channels_importance_ascending"].tolist() == list(range(6))


def test_every_class_of_the_registry_has_a_case() -> None:
    covered = {type(case.make_hook(case.make_module(12, torch.float32), 5)) for case in CASES}
    # In test_experts.py, and in test_random_order.py.
    routed = {RoutedL2NormHook, RoutedMeanHook, RouterWeightedNormHook, ExpertFrequencyHook, OutputNormHook}
    routed |= {OutputVarianceHook, RandomHook}
    of_package = {method.hook for method in methods().values() if method.hook.__module__.startswith("megascore.")}
    # What jobs measure has no calls; it is in test_measured.py.
    assert {hook for hook in of_package if not hook.needs_job} == covered | routed
