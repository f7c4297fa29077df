"""Hooks that a job feeds: what it has added up comes out as the score, and no module can call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megascore.errors import HookStateError
from megascore.hooks import HeadTaylorHook, LossWithoutHook, OutputErrorHook, SpanSimilarityHook, TaylorHook
from megascore.hooks.measured import MeasuredHook
from megascore.hooks.registry import methods

pytestmark = pytest.mark.fast

SUMS = {
    "tokens": 12.0,
    "calls": 3.0,
    "nats_added": -4.5,
    "predicted": 9.0,
    "squared_error": 2.0,
    "squared_norm": 8.0,
    "span_tokens": 12.0,
    "span_calls": 3.0,
    "cosines": 9.0,
}
SCORES = {LossWithoutHook: -0.5, OutputErrorHook: 0.25, SpanSimilarityHook: 0.25}
every_class = pytest.mark.parametrize("hook_class", SCORES, ids=lambda hook_class: hook_class.__name__)


def sums(factor: float = 1.0) -> dict[str, Any]:
    return {name: torch.tensor(factor * value, dtype=torch.float64) for name, value in SUMS.items()}


def made(hook_class: Any) -> MeasuredHook:
    hook: MeasuredHook = hook_class()
    hook.allocate(1, "cpu")
    return hook


def test_every_class_of_the_registry_is_here() -> None:
    of_jobs = {method.hook for method in methods().values() if method.hook.needs_job}
    # In test_taylor.py.
    assert of_jobs == {*SCORES, TaylorHook, HeadTaylorHook}


@every_class
def test_what_was_added_up_comes_out(hook_class: Any) -> None:
    hook = made(hook_class)
    hook.feed(sums())
    hook.feed(sums(2.0))
    assert hook.accumulate().tolist() == [SCORES[hook_class]]
    assert int(hook.state["num_tokens"]) == 36
    other = made(hook_class)
    other.load_state_dict(hook.state_dict())
    assert torch.equal(other.accumulate(), hook.accumulate())


@every_class
def test_nothing_changes_nothing(hook_class: Any) -> None:
    hook = made(hook_class)
    hook.feed(sums(0.0))
    with pytest.raises(AssertionError, match="no activations collected"):
        hook.accumulate()
    hook.feed(sums())
    hook.feed(sums(0.0))
    assert hook.accumulate().tolist() == [SCORES[hook_class]]


@every_class
def test_no_module_calls_it(hook_class: Any) -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(hook_class())
    with pytest.raises(HookStateError, match=r"can't be registered as a forward hook.*torchrun -m megascore score"):
        layer(torch.zeros(1, 2))


def test_a_loss_of_no_predicted_token_is_refused() -> None:
    hook = made(LossWithoutHook)
    hook.feed({**sums(), "predicted": torch.zeros((), dtype=torch.float64)})
    with pytest.raises(HookStateError, match="no token was predicted, as each document is one token"):
        hook.accumulate()


def test_a_state_of_another_span_is_refused() -> None:
    hook = SpanSimilarityHook(3)
    hook.allocate(1, "cpu")
    hook.feed(sums())
    with pytest.raises(HookStateError, match="span is 3 there, 4 here"):
        SpanSimilarityHook().load_state_dict(hook.state_dict())
