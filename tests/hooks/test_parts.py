"""Calls whose parts lie on several ranks: `pending` and `settle`, with ranks played by objects in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megascore.hooks import ForwardHook, IterativeChannelContributionHook
from tests.hooks.cases import CASES, ITERATIVE, L2_NORM, Case, random_calls

pytestmark = pytest.mark.fast


def settle_together(hooks: list[ForwardHook]) -> None:
    """Do what an all-reduce would do."""
    waiting = [hook.pending() for hook in hooks]
    summed: list[Tensor] = [torch.stack(parts).sum(0) for parts in zip(*waiting, strict=True)]
    for hook in hooks:
        hook.settle([value.clone() for value in summed])


def deferring(case: Case, module: torch.nn.Module, num_calls: int) -> ForwardHook:
    hook = case.make_hook(module, num_calls)
    hook.defers = True
    return hook


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settle_after", [1, 5], ids=["each call", "all calls"])
def test_samples_cut_along_the_sequence_score_as_whole_ones(masked: bool, settle_after: int) -> None:
    torch.manual_seed(0)
    module = L2_NORM.make_module(12, torch.float32)
    calls = random_calls(module, shape=(9, 4), masked=masked)
    ranks = [deferring(L2_NORM, module, 5) for _ in range(3)]
    for number, (x, y, mask) in enumerate(calls, 1):
        # The last rank has no part of any sequence.
        for rank, tokens in zip(ranks, (slice(0, 4), slice(4, 9), slice(9, 9)), strict=True):
            rank.observe(x[tokens], y[tokens], None if mask is None else mask[tokens])
        if number % settle_after == 0:
            settle_together(ranks)
    expected = L2_NORM.expected(calls, module)["score"]
    for rank in ranks:
        torch.testing.assert_close(rank.accumulate().double(), expected, rtol=2e-6, atol=0)
        assert int(rank.state["num_calls"]) == 5
        assert rank.pending() == []
    assert sum(int(rank.state["num_tokens"]) for rank in ranks) == sum(
        int(mask.sum()) if mask is not None else 36 for *_, mask in calls
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.iterative], ids=lambda case: case.name)
@pytest.mark.parametrize("masked", [False, True])
def test_replicas_with_other_tokens_agree_on_every_pruned_channel(case: Case, masked: bool) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module, shape=(10, 4), masked=masked)
    ranks = [deferring(case, module, 5) for _ in range(3)]
    for x, y, mask in calls:
        # Two micro-batches an iteration on the first rank, one on the second, none on the third.
        for rank, samples in ((0, slice(0, 1)), (0, slice(1, 2)), (1, slice(2, 4)), (2, slice(4, 4))):
            part = None if mask is None else mask[:, samples]
            ranks[rank].observe(x[:, samples], y[:, samples], part)
        settle_together(ranks)
    settle_together(ranks)
    expected = case.expected(calls, module)
    for rank in ranks:
        assert rank.to_dict()["score"].tolist() == expected["score"].tolist()


def test_residual_and_choice_can_be_shared_by_shards() -> None:
    """What a tensor-parallel subclass overrides is enough to score a layer whose channels are on two ranks."""
    torch.manual_seed(0)
    module = ITERATIVE.make_module(6, torch.float64)
    calls = random_calls(module, 6, torch.float64, num_calls=3)
    seen: list[tuple[int, ...]] = []

    class Watching(IterativeChannelContributionHook):
        def _reduce_over_shards(self, residual: Tensor) -> Tensor:
            seen.append(tuple(residual.shape))
            return residual

    hook = Watching(module, {"validation_full_iters": 3})
    for x, y, _ in calls:
        hook.observe(x, y)
    assert seen == [(36, 7)] * 2, "not before a channel is pruned, then for each chunk of tokens"
