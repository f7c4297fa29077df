"""Hooks in surroundings that change what a tensor is: inference mode, weights in fewer bits, compiled models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.hooks import IndependentChannelContributionHook
from tests.hooks.cases import CASES, NUM_CALLS, Case, feed, random_calls
from tests.models import save_checkpoint


@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "made outside"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_waits_for_other_ranks_can_be_added_up_outside_of_inference_mode(case: Case, inside: bool) -> None:
    module = case.make_module(12, torch.float64).requires_grad_(False)
    calls = random_calls(module, dtype=torch.float64)
    expected = feed(case.make_hook(module, NUM_CALLS), calls).to_dict()
    with torch.inference_mode(inside):
        hook = case.make_hook(module, NUM_CALLS)
        hook.allocate(1 if case.name == "block_similarity" else 3 if case.channels_of == 3 else 12, "cpu")
    hook.defers = case.iterative or case.name in ("l2_norm", "mean_mean", "l2_mean")
    for call in calls:
        with torch.inference_mode():
            feed(hook, [call])
        waiting = hook.pending()
        for tensor in waiting:
            # What adding up over ranks does.
            tensor.copy_(tensor * 1)
        hook.settle(waiting)
    for name, value in hook.to_dict().items():
        torch.testing.assert_close(value, expected[name])


class InHalves(Tensor):
    """As Transformer Engine's quantized tensors: numbers in another form, and no views."""

    @staticmethod
    def __new__(cls, content: Tensor) -> InHalves:
        return Tensor._make_subclass(cls, content / 2)

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) * 2

    def view(self, *_: object) -> Tensor:
        raise NotImplementedError("no views")


def test_a_quantized_weight_counts_as_the_numbers_that_it_stands_for() -> None:
    linear = nn.Linear(6, 4)
    expected = IndependentChannelContributionHook(linear).state["weight_norm"]
    quantized = nn.Module()
    quantized.weight = InHalves(linear.weight.detach())
    torch.testing.assert_close(IndependentChannelContributionHook(quantized).state["weight_norm"], expected)


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_model_is_scored_as_it_would_be_without(how: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path / "llama", "llama"))
    tokens = torch.arange(16).view(2, 8)
    scores = [{"target": "ffn"}]
    with megascore.attach(model, scores=scores) as run, torch.no_grad():
        model(tokens, use_cache=False)
        run.step()
    expected = run.finish()
    if how == "in place":
        model.compile(backend="eager")
    compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
    with torch.no_grad():
        # Without hooks.
        compiled(tokens, use_cache=False)
        with megascore.attach(compiled, scores=scores) as run:
            compiled(tokens, use_cache=False)
            run.step()
    found = run.finish()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])
