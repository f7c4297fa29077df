"""Faults of the published implementation, and misuse: each is right here, or a clear error."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from megascore.errors import HookStateError
from megascore.hooks import (
    BlockSimilarityHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from megascore.hooks.weights import weight_matrix
from tests.hooks.cases import CASES, ITERATIVE, Case, assert_same, every_additive, every_class, feed, random_calls

pytestmark = pytest.mark.fast

iterative_cases = [case for case in CASES if case.iterative]


@every_class
def test_call_without_tokens_changes_nothing(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module, shape=(6, 3))
    x, y, _ = calls[0]
    empty = [(x[:0], y[:0], None), (x[:, :0], y[:, :0], None), (x, y, torch.zeros(6, 3, dtype=torch.bool))]
    plain, mixed = (case.make_hook(module, 5) for _ in range(2))
    feed(plain, calls)
    feed(mixed, [empty[0], calls[0], *empty, *calls[1:], *(empty if not case.iterative else [])])
    assert_same(mixed.to_dict(), {key: value.double() for key, value in plain.to_dict().items()}, 0)
    if case.iterative:
        assert mixed.get_progress_info() == plain.get_progress_info()


@every_class
def test_no_activations_yet_is_an_assertion_error(case: Case) -> None:
    hook = case.make_hook(case.make_module(12, torch.float32), 5)
    for read in (hook.accumulate, hook.to_dict):
        with pytest.raises(AssertionError, match=f"{type(hook).__name__}: no activations collected yet"):
            read()


def test_sample_without_counted_tokens_adds_nothing() -> None:
    mask = torch.tensor([[True, False], [True, False]])
    hook = L2NormHook()
    hook.observe(torch.ones(2, 2, 3), torch.empty(0), mask)
    assert hook.accumulate().tolist() == [1, 1, 1]
    assert int(hook.state["num_samples"]) == 1


@every_additive
def test_calls_of_other_sizes_weigh_by_their_tokens(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module, shape=(20, 2), num_calls=1) + random_calls(module, shape=(1, 2), num_calls=1)
    assert_same(feed(case.make_hook(module, 2), calls).to_dict(), case.expected(calls, module), 1e-5)


@pytest.mark.parametrize("case", iterative_cases, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_negative_rounding_residue_under_the_root_is_no_nan(case: Case, dtype: torch.dtype) -> None:
    # Channels come in pairs that cancel exactly: with one of a pair pruned, removing the other brings the output back.
    torch.manual_seed(0)
    module = nn.Linear(8, 16, bias=False).to(dtype)
    with torch.no_grad():
        module.weight[:, 4:] = -module.weight[:, :4]
    x = torch.randn(400, 1, 4).to(dtype) * 1000
    x = torch.cat([x, x], dim=-1)
    hook = case.make_hook(module, 4)
    for _ in range(3):
        hook(module, (x,), module(x))
    assert hook.state["agg_contribution"].isfinite().all()
    hook(module, (x,), module(x))
    assert sorted(hook.accumulate().tolist()) == list(range(8))


@pytest.mark.parametrize("case", iterative_cases, ids=lambda case: case.name)
def test_float16_does_not_overflow_in_the_iterative_score(case: Case) -> None:
    torch.manual_seed(0)
    module = nn.Linear(16, 8, bias=False).half()
    calls = random_calls(module, 16, torch.float16, num_calls=16)
    for x, y, _ in calls:
        x[..., 3] = 1500
        y.copy_(module(x).detach())
    hook = feed(case.make_hook(module, 16), calls)
    assert_same(hook.to_dict(), case.expected(calls, module), 0)


@every_additive
def test_float16_does_not_overflow_in_sums(case: Case) -> None:
    module = case.make_module(12, torch.float16)
    x = torch.full((300, 2, 12), 60000.0, dtype=torch.float16)
    y = torch.full((300, 2, 12 if case.norm else 7), 60000.0, dtype=torch.float16)
    assert feed(case.make_hook(module, 1), [(x, y, None)]).accumulate().isfinite().all()


@pytest.mark.parametrize("case", iterative_cases, ids=lambda case: case.name)
def test_bias_is_no_contribution(case: Case) -> None:
    torch.manual_seed(0)
    plain, biased = nn.Linear(10, 6, bias=False), nn.Linear(10, 6)
    with torch.no_grad():
        biased.weight.copy_(plain.weight)
        biased.bias.fill_(1000)
    inputs = [torch.randn(8, 2, 10, dtype=torch.float64) for _ in range(5)]
    scores = [
        feed(case.make_hook(module, 5), [(x, module(x).detach(), None) for x in inputs]).accumulate().tolist()
        for module in (plain.double(), biased.double())
    ]
    assert scores[0] == scores[1]


def test_bias_returned_beside_the_output_is_not_subtracted() -> None:
    class ReturnsBias(nn.Linear):
        input_size = 10
        skip_bias_add = True

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return nn.functional.linear(x, self.weight), self.bias

    torch.manual_seed(0)
    module, settings = ReturnsBias(10, 6), {"validation_full_iters": 2, "calibration_method": "scale_by_magnitude"}
    plain = nn.Linear(10, 6, bias=False)
    plain.weight = module.weight
    hooks = [IterativeChannelContributionHook(layer, settings) for layer in (module, plain)]
    for layer, hook in zip((module, plain), hooks, strict=True):
        layer.register_forward_hook(hook)
        torch.manual_seed(1)
        for _ in range(2):
            layer(torch.randn(4, 3, 10))
    assert torch.equal(hooks[0].accumulate(), hooks[1].accumulate())


@every_class
def test_autograd_graph_is_not_kept(case: Case) -> None:
    module = case.make_module(12, torch.float32)
    x = torch.randn(4, 2, 12, requires_grad=True)
    hook = case.make_hook(module, 1)
    hook(module, (x,), module(x))
    assert all(not value.requires_grad for value in hook.state.values())
    assert all(not value.requires_grad for value in hook.to_dict().values())


@every_class
def test_autocast_around_the_forward_pass_rounds_nothing(case: Case) -> None:
    torch.manual_seed(0)
    module = case.make_module(12, torch.float32)
    calls = random_calls(module)
    plain, surrounded = case.make_hook(module, 5), case.make_hook(module, 5)
    feed(plain, calls)
    with torch.autocast("cpu", torch.bfloat16):
        feed(surrounded, calls)
    assert torch.equal(surrounded.accumulate(), plain.accumulate())


@every_class
def test_hook_leaves_input_output_and_mask_as_they_are(case: Case) -> None:
    module = case.make_module(12, torch.float32)
    hook = case.make_hook(module, 5)
    for x, y, mask in random_calls(module, masked=True):
        before = [x.clone(), y.clone(), mask.clone()]
        hook.observe(x, y, mask)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip((x, y), before[:2], strict=True))
        assert torch.equal(mask, before[2])
    assert hook(module, (x.nan_to_num(),), y.nan_to_num()) is None if not case.iterative else True


@pytest.mark.parametrize("case", iterative_cases, ids=lambda case: case.name)
def test_one_batch_too_many_is_told(case: Case) -> None:
    module = case.make_module(12, torch.float32)
    calls = random_calls(module)
    hook = feed(case.make_hook(module, 5), calls)
    result = hook.accumulate()
    with pytest.raises(HookStateError, match="has done all of its 5 iterations; this call is one too many"):
        feed(hook, calls[:1])
    assert torch.equal(hook.accumulate(), result)


@pytest.mark.parametrize("case", iterative_cases, ids=lambda case: case.name)
def test_one_batch_too_few_is_told(case: Case) -> None:
    module = case.make_module(12, torch.float32)
    hook = feed(case.make_hook(module, 5), random_calls(module)[:4])
    with pytest.raises(HookStateError, match=re.escape("done 4 of 5 iterations (10 of 12 channels are ranked)")):
        hook.accumulate()


def test_unknown_calibration_is_refused_by_name() -> None:
    with pytest.raises(HookStateError, match="unknown calibration_method 'scale'; expected None or 'scale_by_magn"):
        IterativeChannelContributionHook(nn.Linear(3, 3), {"validation_full_iters": 2, "calibration_method": "scale"})


@pytest.mark.parametrize("value", [0, -1, 2.5, None, "3"])
def test_number_of_iterations_must_be_one(value: object) -> None:
    with pytest.raises(HookStateError, match="must be a positive integer"):
        IterativeChannelContributionHook(nn.Linear(3, 3), {"validation_full_iters": value})


def test_one_hook_on_modules_of_two_sizes_is_told() -> None:
    hook = feed(L2NormHook(), [(torch.randn(2, 1, 4), torch.empty(0), None)])
    with pytest.raises(HookStateError, match="has seen 4 channels, this call brings 5"):
        feed(hook, [(torch.randn(2, 1, 5), torch.empty(0), None)])


def test_layers_that_do_not_fit_are_told() -> None:
    class Shard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_size = 8
            self.weight = nn.Parameter(torch.randn(3, 4))

    for make in (
        IndependentChannelContributionHook,
        lambda layer: IterativeChannelContributionHook(layer, {"validation_full_iters": 2}),
        lambda layer: IndependentKvHeadContributionHook.for_heads(layer, 2),
    ):
        with pytest.raises(HookStateError, match="has 8 inputs but its weight has the shape .3, 4."):
            make(Shard())
        with pytest.raises(HookStateError, match="has no weight"):
            make(nn.ReLU())
    with pytest.raises(HookStateError, match="has none"):
        LayerNormContributionHook(nn.LayerNorm(3, elementwise_affine=False), {})
    with pytest.raises(HookStateError, match="by 3 KV heads equally"):
        IndependentKvHeadContributionHook.for_heads(nn.Linear(8, 2), 3)


def test_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(HookStateError, match=re.escape("got the shape [2, 3, 4, 5]")):
        L2NormHook()(nn.Identity(), (torch.zeros(2, 3, 4, 5),), torch.zeros(1))
    with pytest.raises(HookStateError, match="must have one shape"):
        BlockSimilarityHook()(nn.Identity(), (torch.zeros(2, 3, 4),), torch.zeros(2, 3, 5))
    with pytest.raises(HookStateError, match="expects 2 x 4 inputs for each token"):
        IndependentKvHeadContributionHook.for_heads(nn.Linear(8, 2), 2)(
            nn.Identity(), (torch.zeros(2, 6),), torch.zeros(1)
        )


def test_keyword_only_calls_are_told() -> None:
    linear = nn.Linear(4, 2)
    linear.register_forward_hook(L2NormHook())
    with pytest.raises(HookStateError, match="keyword arguments only"):
        linear(input=torch.zeros(2, 1, 4))


def test_zero_vectors_have_no_cosine_and_no_nan() -> None:
    hook = BlockSimilarityHook()
    hook(nn.Identity(), (torch.zeros(2, 1, 4),), torch.ones(2, 1, 4))
    assert hook.accumulate().tolist() == [1]


def test_iteration_emptied_by_a_mask_nobody_could_read_is_told() -> None:
    # On a GPU the host cannot know that a mask is empty; the count on the device tells when a result is asked for.
    module = ITERATIVE.make_module(4, torch.float32)
    hook = feed(ITERATIVE.make_hook(module, 2), random_calls(module, 4, num_calls=1))
    assert isinstance(hook, IterativeChannelContributionHook)
    hook._advance(torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    with pytest.raises(HookStateError, match="the mask of an iteration left no token"):
        hook.accumulate()


class Adapted(nn.Module):
    """A linear layer as peft wraps it."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 4, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        self.in_features, self.merged = 6, merged

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


def test_a_weight_with_an_adapter_beside_it_is_refused_until_it_is_merged() -> None:
    with pytest.raises(HookStateError, match=r"Adapted has an adapter \(lora_A\).*merge_and_unload"):
        weight_matrix(Adapted(merged=False), "hook")
    assert weight_matrix(Adapted(merged=True), "hook").shape == (4, 6)
