"""The two scores of routed experts: formulas, batches in any cut, masks, experts without tokens, wrong use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascore.errors import HookStateError
from megascore.hooks import RoutedL2NormHook, RouterWeightedNormHook

pytestmark = pytest.mark.fast

NUM_EXPERTS, NUM_TOKENS, NUM_FEATURES, WITHOUT_TOKENS = 5, 40, 6, 3


def make_routing(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the expert of each token, none of them number 3, and the weighted outputs."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (NUM_TOKENS,), generator=generator)]
    return experts, torch.randn(NUM_TOKENS, NUM_FEATURES, generator=generator, dtype=torch.float64)


def make_hook() -> RouterWeightedNormHook:
    hook = RouterWeightedNormHook()
    hook.allocate(NUM_EXPERTS, "cpu")
    return hook


def test_an_expert_scores_the_mean_norm_of_its_outputs() -> None:
    experts, outputs = make_routing()
    hook = make_hook()
    for rows in torch.arange(NUM_TOKENS).split(7):
        hook.observe(experts[rows], outputs[rows])
    results = hook.to_dict()
    for number in (0, 1, 2, 4):
        own = outputs[experts == number]
        assert results["tokens_per_expert"][number] == len(own)
        expected = (own**2).sum(1).sqrt().sum() / len(own)
        torch.testing.assert_close(results["score"][number], expected, rtol=1e-14, atol=0)


def test_an_expert_without_tokens_is_told_by_its_count_and_is_not_nan() -> None:
    hook = make_hook()
    hook.observe(*make_routing())
    results = hook.to_dict()
    assert results["tokens_per_expert"][WITHOUT_TOKENS] == 0
    assert results["score"].isfinite().all()


def test_masked_tokens_count_for_no_expert_whatever_they_hold() -> None:
    experts, outputs = make_routing()
    mask = torch.arange(NUM_TOKENS) % 3 > 0
    masked, chosen = make_hook(), make_hook()
    masked.observe(experts, outputs.masked_fill(~mask.unsqueeze(1), torch.nan), mask)
    chosen.observe(experts[mask], outputs[mask])
    for name, value in chosen.to_dict().items():
        torch.testing.assert_close(masked.to_dict()[name], value, rtol=1e-14, atol=0)
    assert masked.state["num_tokens"] == int(mask.sum())


def test_a_call_without_tokens_changes_nothing() -> None:
    experts, outputs = make_routing()
    hook, inside = make_hook(), RoutedL2NormHook()
    hook.observe(experts[:0], outputs[:0])
    inside.observe(outputs[:0], outputs[:0])
    assert not any(value.any() for value in (*hook.state.values(), *inside.state.values()))
    with pytest.raises(AssertionError, match="no activations collected yet"):
        hook.accumulate()


def test_partial_outputs_are_completed_before_the_norm_and_left_as_they_were() -> None:
    experts, outputs = make_routing()

    class Completing(RouterWeightedNormHook):
        partial_outputs = True

        def complete(self, partial: Tensor) -> None:
            partial.mul_(3)

    hook, whole, before = Completing(), make_hook(), outputs.clone()
    hook.allocate(NUM_EXPERTS, "cpu")
    hook.observe(experts, outputs)
    whole.observe(experts, 3 * outputs)
    assert torch.equal(outputs, before)
    assert torch.equal(hook.accumulate(), whole.accumulate())


def test_a_saved_state_goes_on_where_it_was() -> None:
    first, second, both = make_hook(), make_hook(), make_hook()
    first.observe(*make_routing(0))
    second.load_state_dict(first.state_dict())
    second.observe(*make_routing(1))
    both.observe(*make_routing(0))
    both.observe(*make_routing(1))
    assert torch.equal(second.accumulate(), both.accumulate())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_channels_inside_an_expert_score_the_norm_over_its_tokens(dtype: torch.dtype) -> None:
    _, tokens = make_routing()
    tokens = tokens.to(dtype)
    hook = RoutedL2NormHook()
    for rows in torch.arange(NUM_TOKENS).split(9):
        hook.observe(tokens[rows], tokens[rows])
    expected = (tokens.double() ** 2).sum(0).sqrt()
    # float32 inside a batch, for which a bfloat16 activation is exact.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(hook.accumulate().double(), expected, rtol=tolerance, atol=0)


def test_masked_tokens_add_nothing_to_channels_whatever_they_hold() -> None:
    _, tokens = make_routing()
    mask = torch.arange(NUM_TOKENS) % 4 > 0
    masked, chosen = RoutedL2NormHook(), RoutedL2NormHook()
    masked.observe(tokens.masked_fill(~mask.unsqueeze(1), torch.inf), tokens, mask)
    chosen.observe(tokens[mask], tokens[mask])
    torch.testing.assert_close(masked.accumulate(), chosen.accumulate(), rtol=1e-14, atol=0)
    assert masked.state["num_tokens"] == int(mask.sum())


def test_wrong_use_is_told() -> None:
    experts, outputs = make_routing()
    with pytest.raises(HookStateError, match=r"call allocate\(number of experts, device\)"):
        RouterWeightedNormHook().observe(experts, outputs)
    with pytest.raises(HookStateError, match=r"got the shapes \[39\] and \[40, 6\]"):
        make_hook().observe(experts[1:], outputs)
    with pytest.raises(HookStateError, match=r"tokens routed to one expert.*\[2, 20, 6\]"):
        RoutedL2NormHook().observe(outputs.view(2, 20, -1), outputs)
