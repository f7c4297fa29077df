"""Saving and loading: copies, complete, at any call, and refused with every reason where it is another's."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from megascore.errors import HookStateError
from megascore.hooks import (
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from tests.hooks.cases import ITERATIVE, KV_HEAD, NUM_CALLS, Case, every_class, feed, random_calls

pytestmark = pytest.mark.fast


@every_class
@pytest.mark.parametrize("done", range(NUM_CALLS + 1))
def test_saved_after_any_call_a_fresh_hook_ends_the_same(case: Case, done: int) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module, masked=True)
    whole = feed(case.make_hook(module, NUM_CALLS), calls).to_dict()
    file = io.BytesIO()
    torch.save(feed(case.make_hook(module, NUM_CALLS), calls[:done]).state_dict(), file)
    file.seek(0)
    fresh = case.make_hook(module, NUM_CALLS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    result = feed(fresh, calls[done:]).to_dict()
    assert list(result) == list(whole)
    for key, value in result.items():
        assert torch.equal(value, whole[key]), key


@every_class
def test_state_is_a_copy_and_loading_replaces_what_was_there(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module)
    hook = feed(case.make_hook(module, NUM_CALLS), calls[:2])
    state = hook.state_dict()
    before = {name: value.clone() for name, value in state["statistics"].items()}
    feed(hook, calls[2:4])
    assert all(torch.equal(value, before[name]) for name, value in state["statistics"].items())
    hook.load_state_dict(state)
    feed(hook, calls[2:])
    for value in state["statistics"].values():
        value.zero_()
    expected = feed(case.make_hook(module, NUM_CALLS), calls).to_dict()
    assert all(torch.equal(value, expected[key]) for key, value in hook.to_dict().items())


@every_class
def test_state_of_another_class_is_refused_by_name(case: Case) -> None:
    module = case.make_module(12, torch.float32)
    hook = case.make_hook(module, NUM_CALLS)
    state = hook.state_dict() | {"hook": "SomeOtherHook"}
    with pytest.raises(HookStateError, match=f"hook is 'SomeOtherHook' there, '{type(hook).__name__}' here"):
        hook.load_state_dict(state)


@every_class
@pytest.mark.parametrize("field", ["hook", "settings", "num_channels", "result_dtype", "statistics"])
def test_incomplete_state_is_refused(case: Case, field: str) -> None:
    module = case.make_module(12, torch.float32)
    state = case.make_hook(module, NUM_CALLS).state_dict()
    del state[field]
    with pytest.raises(HookStateError, match=f"it has no {field}"):
        case.make_hook(module, NUM_CALLS).load_state_dict(state)


def test_every_difference_is_named_and_nothing_changes() -> None:
    torch.manual_seed(0)
    small, large = nn.Linear(4, 3), nn.Linear(6, 3)
    saved = IterativeChannelContributionHook(small, {"validation_full_iters": 4})
    own = IterativeChannelContributionHook(
        large, {"validation_full_iters": 3, "calibration_method": "scale_by_magnitude"}
    )
    feed(own, random_calls(large, 6, num_calls=2))
    before = own.state_dict()
    with pytest.raises(HookStateError) as raised:
        own.load_state_dict(saved.state_dict())
    message = str(raised.value)
    assert "validation_full_iters is 4 there, 3 here" in message
    assert "calibration_method is None there, 'scale_by_magnitude' here" in message
    assert "num_channels is 4 there, 6 here" in message
    for name, value in own.state_dict()["statistics"].items():
        assert torch.equal(value, before["statistics"][name])
    assert own.get_progress_info()["curr_iter"] == 2


@pytest.mark.parametrize(
    "make",
    [
        IndependentChannelContributionHook,
        lambda linear: IterativeChannelContributionHook(linear, {"validation_full_iters": 2}),
        lambda linear: IndependentKvHeadContributionHook.for_heads(linear, 2),
        lambda linear: LayerNormContributionHook(_norm_with(linear.weight[0]), {}),
    ],
    ids=["independent", "iterative", "kv_head", "layer_norm"],
)
def test_state_of_other_weights_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    state = make(linear).state_dict()
    make(linear).load_state_dict(state)
    with torch.no_grad():
        linear.weight[:, 1] *= 1.01
    hook = make(linear)
    with pytest.raises(HookStateError, match=r"weights differ in 1 of \d channels"):
        hook.load_state_dict(state)


def _norm_with(weight: torch.Tensor) -> nn.Module:
    norm = nn.LayerNorm(len(weight))
    norm.weight = nn.Parameter(weight.detach().clone())
    return norm


def test_missing_foreign_and_misshapen_statistics_are_named() -> None:
    hook = feed(L2NormHook(), [(torch.randn(2, 3, 4), torch.empty(0), None)])
    state = hook.state_dict()
    del state["statistics"]["num_samples"]
    state["statistics"]["sum_of_squared_means"] = torch.zeros(5)
    state["statistics"]["sum_of_abs"] = torch.zeros(4)
    with pytest.raises(HookStateError) as raised:
        hook.load_state_dict(state)
    assert "'num_samples' is missing" in str(raised.value)
    assert "'sum_of_squared_means' has shape [5] there, [4] here" in str(raised.value)
    assert "'sum_of_squared_means' is float32 there, float64 here" in str(raised.value)
    assert "'sum_of_abs' is there, but not kept here" in str(raised.value)


def test_width_of_the_heads_is_part_of_the_state() -> None:
    wide, narrow = (KV_HEAD.make_hook(nn.Linear(size, 5), 1) for size in (12, 6))
    with pytest.raises(HookStateError, match="inputs of a KV head is 4 there, 2 here"):
        narrow.load_state_dict(wide.state_dict())


def test_empty_state_empties_a_hook() -> None:
    hook = feed(L2NormHook(), [(torch.randn(2, 3, 4), torch.empty(0), None)])
    hook.load_state_dict(L2NormHook().state_dict())
    with pytest.raises(AssertionError, match="no activations collected yet"):
        hook.accumulate()
    feed(hook, [(torch.ones(2, 1, 6), torch.empty(0), None)])
    assert hook.accumulate().tolist() == [1] * 6


def test_loading_a_finished_iterative_state_gives_its_result_at_once() -> None:
    torch.manual_seed(0)
    module = ITERATIVE.make_module(12, torch.float32)
    done = feed(ITERATIVE.make_hook(module, NUM_CALLS), random_calls(module))
    fresh = ITERATIVE.make_hook(module, NUM_CALLS)
    fresh.load_state_dict(done.state_dict())
    assert torch.equal(fresh.accumulate(), done.accumulate())
    assert fresh.get_progress_info() == done.get_progress_info()
