"""The scores that must come out: float64 formulas on the raw activations of the unsharded model.

Written without the package's hooks, kernels, merging or site discovery, so that agreement means something.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.hooks.oracles import MOMENTS, moment_score

__all__ = [
    "ITERATIVE",
    "Recorder",
    "all_scores",
    "expected_contributions",
    "expected_moments",
    "expected_scores",
    "expected_taylor",
    "expected_without_layers",
    "iterative_ranks",
    "moment_scores",
    "projection_moments",
]

ITERATIVE = "iterative_contribution"
EPSILON = 1e-8

LINEARS = {"mlp.linear_fc2": "ffn", "self_attention.linear_proj": "attention_heads"}
NORMS = ("input_layernorm", "pre_mlp_layernorm")
FUSED_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
"""Linear layers that may have the norm before them inside, as Transformer Engine's do, and its name otherwise."""


class Recorder:
    """Keeps the raw activations of an unsharded Megatron model, sequence first [S, B, C], call after call."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.weights = {
            name: module.weight.detach().double()
            for name, module in model.named_modules()
            if name.endswith(("linear_fc2", "linear_proj"))
        }
        inside = dict(_fused_norms(model))
        for name, module in model.named_modules():
            if name in inside.values():
                continue  # nothing, where the norm is inside of the linear layer
            if name in inside:
                module.register_forward_hook(self._keep_normalized(inside[name]))
            if re.fullmatch(
                r"decoder\.layers\.\d+(\..*(linear_fc2|linear_proj|layernorm))?|decoder\.final_layernorm", name
            ):
                module.register_forward_hook(self._keep(name), with_kwargs=True)

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[name].append((args[0] if args else kwargs["hidden_states"]).detach().double().clone())
            self.outputs[name].append((output[0] if isinstance(output, tuple) else output).detach().double().clone())

        return hook

    def _keep_normalized(self, name: str) -> Any:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
            self.outputs[name].append(_normalized(linear, args[0].detach().double()))

        return hook


def _fused_norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of linear layers with a norm inside, and the names that their norms would have."""
    for name, module in model.named_modules():
        found = re.fullmatch(r"(decoder\.layers\.\d+)\.(.*)", name)
        if found and found[2] in FUSED_NORMS and getattr(module, "layer_norm_weight", None) is not None:
            yield name, f"{found[1]}.{FUSED_NORMS[found[2]]}"


def _normalized(linear: Any, x: Tensor) -> Tensor:
    """What the norm inside of a linear layer gives, by the formulas of RMSNorm and LayerNorm."""
    gamma = linear.layer_norm_weight.detach().double() + float(linear.zero_centered_gamma)
    if linear.normalization == "RMSNorm":
        return x / ((x**2).mean(-1, keepdim=True) + linear.eps).sqrt() * gamma
    assert linear.normalization == "LayerNorm"
    centred = x - x.mean(-1, keepdim=True)
    deviation = ((centred**2).mean(-1, keepdim=True) + linear.eps).sqrt()
    return centred / deviation * gamma + linear.layer_norm_bias.detach().double()


def expected_scores(recorder: Recorder, num_layers: int, head_dim: int) -> dict[str, Tensor]:
    """Scores of the minitron recipe, by the keys of the score file."""
    scores: dict[str, Tensor] = {}
    hidden = _l2_norm(recorder.outputs["decoder.final_layernorm"])
    scores["decoder.final_layernorm/hidden_size/l2_norm"] = hidden
    similarity = []
    for number in range(num_layers):
        layer = f"decoder.layers.{number}"
        for module, target in LINEARS.items():
            if f"{layer}.{module}" not in recorder.inputs:
                continue  # a layer with experts
            channels = _l2_norm(recorder.inputs[f"{layer}.{module}"])
            if target == "attention_heads":
                channels = torch.stack([(head**2).sum().sqrt() for head in channels.split(head_dim)])
            scores[f"{layer}.{module}/{target}/l2_norm"] = channels
        for norm in NORMS:
            own = _l2_norm(recorder.outputs[f"{layer}.{norm}"])
            scores[f"{layer}.{norm}/hidden_size/l2_norm"] = own
            hidden = hidden + own
        similarity.append(1 - _mean_cosine(recorder.inputs[layer], recorder.outputs[layer]))
    scores["decoder/hidden_size/l2_norm"] = hidden
    scores["decoder/layers/block_similarity"] = torch.stack(similarity)
    return scores


def _l2_norm(calls: list[Tensor]) -> Tensor:
    total = torch.zeros(calls[0].shape[-1], dtype=torch.float64)
    for activation in calls:
        for sample in activation.unbind(1):
            total += (sample.abs().sum(0) / len(sample)) ** 2
    return total.sqrt()


def _mean_cosine(before: list[Tensor], after: list[Tensor]) -> Tensor:
    cosines = []
    for x, y in zip(before, after, strict=True):
        cosines.append(((x * y).sum(-1) / ((x**2).sum(-1).sqrt() * (y**2).sum(-1).sqrt())).flatten())
    return torch.cat(cosines).mean()


def all_scores(num_steps: int) -> list[dict[str, Any]]:
    """Every target and method of dense models that has a hook of its own; one iteration for each step."""
    return [
        {"target": "ffn"},
        {"target": "ffn", "method": "independent_contribution"},
        {"target": "ffn", "method": ITERATIVE, "iterations": num_steps, "calibration_method": "scale_by_magnitude"},
        {"target": "attention_heads", "method": "l2_norm"},
        {"target": "kv_heads"},
        {"target": "hidden_size"},
        {"target": "hidden_size", "method": "layer_norm_contribution"},
        {"target": "layers"},
    ]


def moment_scores() -> list[dict[str, Any]]:
    """What one hook at each projection and norm keeps the moments for, and what each query head adds to the output."""
    targets = {
        "ffn": MOMENTS,
        "attention_heads": (*MOMENTS, "independent_contribution"),
        "hidden_size": MOMENTS_OF_NORMS,
    }
    return [{"target": target, "method": method} for target, methods in targets.items() for method in methods]


def _head_norms(recorder: Recorder, projection: str, num_heads: int) -> Tensor:
    x, weight = _tokens(recorder.inputs[projection]), recorder.weights[projection]
    width = x.shape[1] // num_heads
    heads = zip(x.split(width, dim=1), weight.split(width, dim=1), strict=True)
    return torch.stack([(x_g @ w_g.T).norm(dim=1).mean() for x_g, w_g in heads])


def expected_moments(recorder: Recorder, num_layers: int, head_dim: int) -> dict[str, Tensor]:
    """Scores of the methods that need moments of activations, and norms of weights."""
    scores: dict[str, Tensor] = {}
    norms = ["decoder.final_layernorm"]
    for number in range(num_layers):
        layer = f"decoder.layers.{number}"
        norms += [f"{layer}.{norm}" for norm in NORMS]
        for module, target in LINEARS.items():
            name = f"{layer}.{module}"
            if name in recorder.inputs:
                found = projection_moments(recorder.inputs[name], recorder.weights[name])
                for method, channels in found.items():
                    heads = torch.stack([part.norm() for part in channels.split(head_dim)])
                    scores[f"{name}/{target}/{method}"] = heads if target == "attention_heads" else channels
    for method in MOMENTS_OF_NORMS:
        own = {
            f"{name}/hidden_size/{method}": moment_score(method, _samples(recorder.outputs[name]), None)
            for name in norms
        }
        scores |= {**own, f"decoder/hidden_size/{method}": torch.stack(list(own.values())).sum(0)}
    return scores


MOMENTS_OF_NORMS = ("mean_mean", "l2_mean", "l2_l2", "variance")


def projection_moments(calls: list[Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Scores of channels [C] by each of these methods, from calls [S, B, C]."""
    return {method: moment_score(method, _samples(calls), weight) for method in MOMENTS}


def _samples(calls: list[Tensor]) -> list[Tensor]:
    return [sample for activation in calls for sample in activation.unbind(1)]


def expected_contributions(
    recorder: Recorder,
    num_layers: int,
    num_kv_heads: int,
    samples_of_step: list[list[int]],
    num_query_heads: int | None = None,
) -> dict[str, Tensor]:
    """Scores of the other methods; call number i of the recorder was sample i alone."""
    scores: dict[str, Tensor] = {}
    by_norm = {}
    for number in range(num_layers):
        layer = f"decoder.layers.{number}"
        fc2, proj = f"{layer}.mlp.linear_fc2", f"{layer}.self_attention.linear_proj"
        if fc2 in recorder.inputs:
            x, weight = _tokens(recorder.inputs[fc2]), recorder.weights[fc2]
            scores[f"{fc2}/ffn/independent_contribution"] = weight.norm(dim=0) * x.abs().mean(0)
            scores[f"{fc2}/ffn/{ITERATIVE}"] = iterative_ranks(recorder, fc2, samples_of_step)
        for target, num_heads in (("kv_heads", num_kv_heads), ("attention_heads", num_query_heads)):
            if num_heads is None:
                continue
            scores[f"{proj}/{target}/independent_contribution"] = _head_norms(recorder, proj, num_heads)
        by_norm.update({f"{layer}.{norm}": recorder.outputs[f"{layer}.{norm}"] for norm in NORMS})
    by_norm["decoder.final_layernorm"] = recorder.outputs["decoder.final_layernorm"]
    means = {f"{name}/hidden_size/layer_norm_contribution": _tokens(out).abs().mean(0) for name, out in by_norm.items()}
    return {**scores, **means, "decoder/hidden_size/layer_norm_contribution": torch.stack(list(means.values())).sum(0)}


def iterative_ranks(recorder: Recorder, linear: str, samples_of_step: list[list[int]]) -> Tensor:
    """Position at which each input channel of a linear layer is pruned; call number i was sample i alone."""
    inputs, outputs = recorder.inputs[linear], recorder.outputs[linear]
    steps = [(_tokens([inputs[i] for i in step]), _tokens([outputs[i] for i in step])) for step in samples_of_step]
    return _iterative_ranks(steps, recorder.weights[linear])


def _tokens(calls: list[Tensor]) -> Tensor:
    return torch.cat([activation.flatten(0, -2) for activation in calls])


def _iterative_ranks(steps: list[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Position at which each channel is pruned, calibrated by magnitude, channel by channel; as many in each step."""
    num_channels = weight.shape[1]
    pruned: list[int] = []
    for number, (x, y) in enumerate(steps):
        residual = x[:, pruned] @ weight[:, pruned].T
        scale = (y - residual).norm(dim=1) / (y.norm(dim=1) + EPSILON)
        error = scale[:, None] * y - (y - residual)
        contribution = {}
        for channel in set(range(num_channels)) - set(pruned):
            changed = error + x[:, channel, None] * weight[:, channel]
            contribution[channel] = float(((changed**2).sum(1) + EPSILON).sqrt().mean())
        until = num_channels * (number + 1) // len(steps)
        order = sorted(contribution, key=lambda channel: (contribution[channel], channel))
        pruned += order[: until - len(pruned)]
    ranks = torch.empty(num_channels, dtype=torch.float64)
    ranks[pruned] = torch.arange(num_channels, dtype=torch.float64)
    return ranks


@torch.no_grad()
def expected_without_layers(model: Any, tokens: Tensor, lengths: Sequence[int], span: int) -> dict[str, Tensor]:
    """Scores of layers that take further passes; samples run one by one, and their first tokens count."""
    layers = model.decoder.layers
    outputs = [_run_whole(model, sample, length) for sample, length in zip(tokens, lengths, strict=True)]
    num_predicted = sum(length - 1 for length in lengths)
    rises, errors = [], []
    for number in range(len(layers)):
        model.decoder.layers = nn.ModuleList([layer for other, layer in enumerate(layers) if other != number])
        without = [_run_whole(model, sample, length) for sample, length in zip(tokens, lengths, strict=True)]
        model.decoder.layers = layers
        rises.append((sum(nats for nats, _ in without) - sum(nats for nats, _ in outputs)) / num_predicted)
        difference = sum(((h - g) ** 2).sum() for (_, h), (_, g) in zip(without, outputs, strict=True))
        errors.append(difference / sum((h**2).sum() for _, h in outputs))
    recorder = Recorder(model)
    for sample in tokens:
        _run_whole(model, sample, 1)
    similarity = torch.zeros(len(layers), dtype=torch.float64)
    for first in range(len(layers) - span + 1):
        sides = recorder.inputs[f"decoder.layers.{first}"], recorder.outputs[f"decoder.layers.{first + span - 1}"]
        before, after = ([h[:n] for h, n in zip(calls, lengths, strict=True)] for calls in sides)
        cosines = [torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in zip(before, after, strict=True)]
        similarity[first] = 1 - torch.cat(cosines).mean()
    return {
        "decoder/layers/loss_without": torch.stack(rises),
        "decoder/layers/output_error": torch.stack(errors),
        "decoder/layers/span_similarity": similarity,
    }


def expected_taylor(model: Any, tokens: Tensor, lengths: Sequence[int], head_dim: int) -> dict[str, Tensor]:
    """First-order Taylor scores: each unit has a factor of 1, and a sample's effect is the derivative by that.

    Samples run one by one, without what does not count.
    """
    totals: dict[str, Tensor] = {}
    for sample, length in zip(tokens, lengths, strict=True):
        factors: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(_scale_layer(factors, name), with_kwargs=True)
            if re.fullmatch(r"decoder\.layers\.\d+", name)
            else module.register_forward_pre_hook(_scale_input(factors, name, head_dim))
            for name, module in model.named_modules()
            if re.fullmatch(r"decoder\.layers\.\d+(\.mlp\.linear_fc2|\.self_attention\.linear_proj)?", name)
        ]
        nats, _ = _run_whole(model, sample[:length], length)
        for handle in handles:
            handle.remove()
        derivatives = torch.autograd.grad(nats, list(factors.values()))
        for name, derivative in zip(factors, derivatives, strict=True):
            totals[name] = totals.get(name, 0) + derivative.detach() ** 2 / len(lengths)
    layers = [totals[f"decoder.layers.{number}"] for number in range(len(model.decoder.layers))]
    channels = {f"{name}/{LINEARS[name.split('.', 3)[3]]}/taylor": totals[name] for name in totals if "linear" in name}
    return {"decoder/layers/taylor": torch.stack(layers), **channels}


def _scale_input(factors: dict[str, Tensor], name: str, head_dim: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        width = head_dim if name.endswith("linear_proj") else 1
        factors[name] = torch.ones(args[0].shape[-1] // width, dtype=torch.float64, requires_grad=True)
        return (args[0] * factors[name].repeat_interleave(width), *args[1:])

    return hook


def _scale_layer(factors: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        factors[name] = torch.ones((), dtype=torch.float64, requires_grad=True)
        before = args[0] if args else kwargs["hidden_states"]
        return (before + factors[name] * (output[0] - before), *output[1:])

    return hook


def _run_whole(model: Any, sample: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the nats of the predicted tokens, and the hidden states before the final norm, of the first tokens."""
    caught: list[Tensor] = []
    handle = model.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: caught.append(args[0].double()))
    logits = model(sample[None], torch.arange(len(sample))[None], None)[0].double()
    handle.remove()
    nats = nn.functional.cross_entropy(logits[: length - 1], sample[1:length], reduction="sum")
    return nats, caught[0][:length]
