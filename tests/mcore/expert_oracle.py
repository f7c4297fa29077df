"""The scores that experts must have: formulas on the weights, and on the raw activations of the unsharded model.

The experts are computed again here from their weights: no hook of the package, and none of Megatron's expert classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.hooks.oracles import moment_score

__all__ = ["Expected", "record"]


@dataclass
class Expected:
    """Sums over all calls of a model, by the keys of the score file."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.tensor(0)))

    inside: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Inputs of each expert's output projection, [tokens, F], call after call."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Of that projection, [H, F]."""

    outputs: dict[str, list[list[Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """Unweighted outputs of each expert of a layer, [tokens, H], call after call."""

    def add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value

    def scores(self) -> dict[str, Tensor]:
        """Return the scores; those without a token are not meaningful."""
        results = {}
        for key, value in self.sums.items():
            if key in self.tokens:
                results[key] = value / self.tokens[key].clamp(min=1)
            else:
                results[key] = value.sqrt()
        for key, calls in self.outputs.items():
            by_expert = [torch.cat(parts) for parts in zip(*calls, strict=True)]
            errors = [((y - y.sum(0) / max(1, len(y))) ** 2).sum() for y in by_expert]
            results[key] = torch.stack(errors) / sum(map(len, by_expert))
        for name, tokens in self.inside.items():
            for method in ("mean_mean", "variance", "wanda", "fluctuation", "weight_norm"):
                # A routed token is a sample of its own.
                sample = torch.cat(tokens)
                if len(sample):
                    samples = list(sample[:, None]) if method == "mean_mean" else [sample]
                    results[f"{name}/expert_ffn/{method}"] = moment_score(method, samples, self.weights[name])
                else:
                    results[f"{name}/expert_ffn/{method}"] = sample.sum(0)
        return results


def record(model: Any, num_real: Callable[[], int | None] = lambda: None) -> Expected:
    """Register on an unsharded model with sequential experts, and return what is filled while it runs.

    Args:
        model: Runs one sample at a time where ``num_real`` is given.
        num_real: Tokens at the beginning of the sample that runs which count; None: all.
    """
    expected = Expected()
    for number, layer in enumerate(model.decoder.layers):
        if hasattr(layer.mlp, "experts"):
            name = f"decoder.layers.{number}.mlp"
            layer.mlp.router.register_forward_hook(_routed(expected, name, layer.mlp.experts, num_real))
            layer.mlp.shared_experts.linear_fc2.register_forward_hook(_shared(expected, name, num_real))
    return expected


def _routed(expected: Expected, name: str, experts: Any, num_real: Callable[[], int | None]) -> Any:
    def hook(_router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tokens = args[0].flatten(0, -2)[: num_real()]
        probabilities, routing_map = (each[: num_real()] for each in output)
        norms, unweighted, outputs = [], [], []
        for number, expert in enumerate(experts.local_experts):
            chosen = routing_map[:, number]
            gate, up = (tokens[chosen] @ expert.linear_fc1.weight.T).chunk(2, dim=-1)
            weight = probabilities[chosen, number].unsqueeze(-1)
            intermediate = nn.functional.silu(gate) * up
            norms.append((weight * (intermediate @ expert.linear_fc2.weight.T)).pow(2).sum(-1).sqrt().sum())
            unweighted.append((intermediate @ expert.linear_fc2.weight.T).pow(2).sum(-1).sqrt().sum())
            outputs.append((intermediate @ expert.linear_fc2.weight.T).detach().double())
            inside = f"{name}.experts.{number}.linear_fc2"
            expected.inside[inside].append((weight * intermediate).detach().double())
            expected.weights[inside] = expert.linear_fc2.weight.detach().double()
            expected.add(f"{inside}/expert_ffn/l2_norm", (weight * intermediate).pow(2).sum(0))
        expected.outputs[f"{name}.experts/experts/output_variance"].append(outputs)
        key = f"{name}.experts/experts/router_weighted_norm"
        expected.add(key, torch.stack(norms))
        expected.tokens[key] = expected.tokens[key] + routing_map.sum(0)
        for method, value in (("output_norm", torch.stack(unweighted)), ("frequency", routing_map.sum(0).double())):
            key = f"{name}.experts/experts/{method}"
            expected.add(key, value)
            # Of the layer's experts together.
            expected.tokens[key] = expected.tokens[key] + routing_map.sum()

    return hook


def _shared(expected: Expected, name: str, num_real: Callable[[], int | None]) -> Any:
    def hook(linear: Any, args: tuple[Tensor, ...], output: Any) -> None:
        inputs = args[0][: num_real()]
        site = f"{name}.shared_experts.linear_fc2/shared_expert_ffn"
        expected.add(f"{site}/l2_norm", inputs.abs().mean(0).pow(2).sum(0))
        key = f"{site}/independent_contribution"
        expected.add(key, inputs.abs().sum((0, 1)) * linear.weight.pow(2).sum(0).sqrt())
        expected.tokens[key] = expected.tokens[key] + inputs.shape[:2].numel()

    return hook
