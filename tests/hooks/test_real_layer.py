"""Each score says something: what it ranks lowest can go at less cost than random channels, or those of small weights.

On layer 10 of SmolLM2-135M and real text; about 10 seconds, and once a minute more to convert the model. Run with
``-s`` to see the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from launch import smollm2
from megascore.hooks import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from tests.models import load_with_transformers

LAYER, SEQUENCE_LENGTH, NUM_CALIBRATION, NUM_HELD_OUT = 10, 256, 16, 8
FRACTION = 0.4
NUM_RANDOM = 20


class Inputs:
    """The input of every linear layer of a transformer layer, [calls, 1, S, C], on text that was and was not scored."""

    def __init__(self) -> None:
        folder = smollm2.convert_once(smollm2.default_folder())
        model = load_with_transformers(folder, torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = Path("launch/text/northanger_abbey.txt").read_text(encoding="utf-8")
        num_tokens = (NUM_CALIBRATION + NUM_HELD_OUT) * SEQUENCE_LENGTH
        # From the middle: the beginning of a book is titles and contents.
        tokens = tokenizer(text[100_000 : 100_000 + 8 * num_tokens], return_tensors="pt").input_ids[0, :num_tokens]
        model.model.layers = model.model.layers[: LAYER + 1]
        layer = model.model.layers[LAYER]
        self.kv_heads = model.config.num_key_value_heads
        self.config = model.config
        self.norm = layer.post_attention_layernorm
        self.linears = {"down": layer.mlp.down_proj, "up": layer.mlp.up_proj, "out": layer.self_attn.o_proj}
        seen: dict[str, list[Tensor]] = {name: [] for name in self.linears}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
            for name, linear in self.linears.items()
        ]
        with torch.no_grad():
            for sequence in tokens.view(-1, SEQUENCE_LENGTH):
                model.model(sequence[None], use_cache=False)
        for handle in handles:
            handle.remove()
        self.calibration = {name: calls[:NUM_CALIBRATION] for name, calls in seen.items()}
        self.held_out = {name: torch.cat(calls[NUM_CALIBRATION:]) for name, calls in seen.items()}

    def error(self, name: str, removed: Tensor) -> float:
        """How far the layer's output is from itself without the removed channels, relative, on held-out text."""
        weight = self.linears[name].weight.detach()
        x = self.held_out[name]
        lost = x[..., removed] @ weight[:, removed].T
        return float(lost.norm() / (x @ weight.T).norm())

    def lowest(self, name: str, score: Tensor) -> float:
        return self.error(name, score.argsort()[: int(FRACTION * len(score))])

    def baselines(self, name: str) -> tuple[float, float]:
        """The errors of random channels, the mean of several draws, and of those with the smallest weight norms."""
        norms = self.linears[name].weight.detach().norm(dim=0)
        random = [self.lowest(name, torch.rand(len(norms))) for _ in range(NUM_RANDOM)]
        return sum(random) / len(random), self.lowest(name, norms)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


def iterative(calibration: str | None) -> Callable[[Inputs], ForwardHook]:
    settings = {"validation_full_iters": NUM_CALIBRATION, "calibration_method": calibration}
    return lambda inputs: IterativeChannelContributionHook(inputs.linears["down"], settings)


HOOKS: list[tuple[str, str, Callable[[Inputs], ForwardHook]]] = [
    ("L2NormHook", "down", lambda inputs: L2NormHook()),
    ("Independent", "down", lambda inputs: IndependentChannelContributionHook(inputs.linears["down"])),
    ("Iterative", "down", iterative(None)),
    ("Iterative, scale_by_magnitude", "down", iterative("scale_by_magnitude")),
    ("LayerNorm", "up", lambda inputs: LayerNormContributionHook(inputs.norm, {})),
]


@pytest.mark.parametrize(("label", "name", "make"), HOOKS, ids=[hook[0] for hook in HOOKS])
def test_lowest_channels_cost_less_than_random_ones_and_small_weights(
    inputs: Inputs, label: str, name: str, make: Callable[[Inputs], ForwardHook]
) -> None:
    torch.manual_seed(0)
    hook = make(inputs)
    linear = inputs.linears[name]
    for x in inputs.calibration[name]:
        # The L2 norm takes the sequence first; what the norm puts out is what the linear layer takes in.
        taken = x.transpose(0, 1) if label == "L2NormHook" else x
        hook(linear, (taken,), taken if label == "LayerNorm" else linear(taken))
    error = inputs.lowest(name, hook.accumulate())
    random, weights = inputs.baselines(name)
    print(f"\n{label:32} {name:5} error {error:.3f}  random {random:.3f}  lowest weight norms {weights:.3f}")
    assert error < 0.9 * random
    assert error < 0.9 * weights


def test_lowest_kv_head_costs_least(inputs: Inputs) -> None:
    linear: nn.Linear = inputs.linears["out"]
    hook = IndependentKvHeadContributionHook.for_heads(linear, inputs.kv_heads)
    for x in inputs.calibration["out"]:
        hook(linear, (x,), linear(x))
    heads = torch.arange(linear.in_features).view(inputs.kv_heads, -1)
    errors = torch.tensor([inputs.error("out", channels) for channels in heads])
    score = hook.accumulate()
    print(f"\nKvHead{'':27}out   error {float(errors[score.argmin()]):.3f}  mean of all {float(errors.mean()):.3f}")
    assert errors.argsort().tolist() == score.argsort().tolist()
