"""First-order Taylor scores: what a job hands to the hook comes out squared by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.errors import HookStateError
from megascore.hooks import HeadTaylorHook, TaylorHook

pytestmark = pytest.mark.fast

UNITS, WIDTH = 3, 4


def made(hook_class: Any = HeadTaylorHook) -> TaylorHook:
    hook: TaylorHook = hook_class()
    hook.allocate(UNITS, "cpu")
    return hook


def call(seed: int, num_samples: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, num_samples, UNITS * WIDTH)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def effects(activation: Tensor, gradient: Tensor) -> Tensor:
    """Of each sample and unit: [B, units]."""
    products = activation.double() * gradient.double()
    return torch.stack([part.sum((0, 2)) for part in products.split(WIDTH, dim=-1)], dim=-1)


def test_the_score_is_the_mean_square_of_what_a_samples_tokens_add_up_to() -> None:
    hook, calls = made(), [call(0), call(1, num_samples=3)]
    for activation, gradient in calls:
        hook.observe_gradient(activation, gradient)
    expected = torch.cat([effects(*tensors) for tensors in calls]).square().mean(0)
    torch.testing.assert_close(hook.accumulate(), expected, rtol=1e-13, atol=0)
    other = made()
    other.load_state_dict(hook.state_dict())
    assert torch.equal(other.accumulate(), hook.accumulate())


def test_masked_tokens_and_samples_without_any_do_not_count() -> None:
    activation, gradient = call(0, num_samples=3)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2:, 0], mask[:, 2] = False, False
    activation[2:, 0], gradient[:, 2] = torch.nan, torch.inf
    hook = made()
    hook.observe_gradient(activation, gradient, mask)
    first, second = (effects(activation[:end, [b]], gradient[:end, [b]])[0] for b, end in ((0, 2), (1, 5)))
    torch.testing.assert_close(hook.accumulate(), (first**2 + second**2) / 2, rtol=1e-13, atol=0)
    assert int(hook.state["num_samples"]) == 2
    assert int(hook.state["num_tokens"]) == 7


def test_parts_of_a_sample_meet_before_they_are_squared() -> None:
    whole, parts = made(), [made(), made()]
    activation, gradient = call(0)
    whole.observe_gradient(activation, gradient)
    for hook, rows in zip(parts, (slice(0, 2), slice(2, 5)), strict=True):
        hook.defers = True
        hook.observe_gradient(activation[rows], gradient[rows])
        assert sum(tensor.numel() for tensor in hook.pending()) == hook.pending_numbers(2)
    summed = [sum(tensors) for tensors in zip(*(hook.pending() for hook in parts), strict=True)]
    parts[0].settle(summed)
    torch.testing.assert_close(parts[0].state["sum_of_squares"], whole.state["sum_of_squares"], rtol=1e-13, atol=0)
    assert parts[0].pending() == []


def test_bfloat16_is_multiplied_and_added_up_exactly_enough() -> None:
    activation, gradient = call(0, dtype=torch.bfloat16)
    hook = made()
    hook.observe_gradient(activation, gradient)
    # Products of bfloat16 are exact in float32; the rest is float64, but for the result.
    torch.testing.assert_close(
        hook.accumulate().double(), effects(activation, gradient).square().mean(0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("hook_class", [TaylorHook, HeadTaylorHook])
def test_no_module_calls_it(hook_class: Any) -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(hook_class())
    with pytest.raises(HookStateError, match=r"needs the gradient of the loss.*torchrun -m megascore score"):
        layer(torch.zeros(1, 2))


def test_tokens_without_samples_are_refused() -> None:
    with pytest.raises(HookStateError, match=r"takes \[sequence, samples, channels\], got \[5, 12\]"):
        made().observe_gradient(torch.zeros(5, 12), torch.zeros(5, 12))
