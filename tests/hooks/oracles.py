"""The scores from their formulas, in float64, one token at a time in spirit: nothing is shared with the package.

A call is (input, output, mask); the mask is None or bool with the input's leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Call = tuple[Tensor, Tensor, "Tensor | None"]
EPSILON = 1e-8


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, [T, features] float64."""
    return (x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).double()


def l2_norm(calls: list[Call], module: nn.Module) -> dict[str, Tensor]:
    total = torch.zeros(calls[0][0].shape[-1], dtype=torch.float64)
    for x, _, mask in calls:
        samples = x[:, None] if x.dim() == 2 else x
        masks = torch.ones(samples.shape[:-1], dtype=torch.bool) if mask is None else mask.reshape(samples.shape[:-1])
        for sample in range(samples.shape[1]):
            tokens = samples[:, sample][masks[:, sample]].double()
            if len(tokens):
                total += tokens.abs().mean(0) ** 2
    return {"score": total.sqrt()}


def samples_of(calls: list[Call]) -> list[Tensor]:
    """Every sample that has tokens that count, [tokens, C] float64."""
    found = []
    for x, _, mask in calls:
        samples = x[:, None] if x.dim() == 2 else x
        masks = torch.ones(samples.shape[:-1], dtype=torch.bool) if mask is None else mask.reshape(samples.shape[:-1])
        found += [samples[:, i][masks[:, i]].double() for i in range(samples.shape[1])]
    return [sample for sample in found if len(sample)]


def moments(calls: list[Call], module: nn.Module, method: str) -> dict[str, Tensor]:
    return {"score": moment_score(method, samples_of(calls), getattr(module, "weight", None))}


def moment_score(method: str, samples: list[Tensor], weight: Tensor | None) -> Tensor:
    """From samples, each [tokens, C] float64, and the weight [E, C] that they meet."""
    tokens = torch.cat(samples)
    norms = torch.ones(()) if weight is None else torch.stack([c.norm() for c in weight.detach().double().unbind(-1)])
    return {
        "mean_mean": lambda: torch.stack([sample.abs().mean(0) for sample in samples]).mean(0),
        "l2_mean": lambda: torch.stack([sample.norm(dim=0) for sample in samples]).mean(0),
        "l2_l2": lambda: tokens.norm(dim=0),
        "variance": lambda: tokens.var(0, unbiased=False),
        "wanda": lambda: norms * tokens.square().mean(0).sqrt(),
        "fluctuation": lambda: norms**2 * tokens.var(0, unbiased=False),
        "weight_norm": lambda: norms,
    }[method]()


MOMENTS = ("mean_mean", "l2_mean", "l2_l2", "variance", "wanda", "fluctuation", "weight_norm")


def pooled_mean(tokens: list[Tensor]) -> Tensor:
    """``calls * mean over all tokens``; calls without tokens are none."""
    return sum(len(part) > 0 for part in tokens) * torch.cat(tokens).mean(0)


def independent(calls: list[Call], module: nn.Module) -> dict[str, Tensor]:
    means = pooled_mean([counted(x, mask).abs() for x, _, mask in calls])
    norms = module.weight.detach().double().norm(dim=0)
    return {"score": norms * means, "weight_norm": norms, "agg_channel_activations": means}


def layer_norm(calls: list[Call], module: nn.Module) -> dict[str, Tensor]:
    means = pooled_mean([counted(y, mask).abs() for _, y, mask in calls])
    return {"score": means, "channels_importance_ascending": means.argsort()}


def kv_head(calls: list[Call], module: nn.Module, num_kv_heads: int) -> dict[str, Tensor]:
    weight = module.weight.detach().double()
    per_call = []
    for x, _, mask in calls:
        tokens = counted(x, mask)
        slices = zip(tokens.chunk(num_kv_heads, 1), weight.chunk(num_kv_heads, 1), strict=True)
        per_call.append(torch.stack([(part @ columns.T).norm(dim=1) for part, columns in slices], dim=1))
    return {"score": pooled_mean(per_call)}


def block_similarity(calls: list[Call], module: nn.Module) -> dict[str, Tensor]:
    cosines = [torch.cosine_similarity(counted(x, mask), counted(y, mask), dim=1) for x, y, mask in calls]
    return {"score": 1 - torch.cat(cosines).mean().reshape(1)}


def schedule(num_channels: int, num_iterations: int) -> list[int]:
    if num_channels < num_iterations:
        last = [(i * num_iterations) // num_channels - 1 for i in range(1, num_channels + 1)]
        return [int(i in last) for i in range(num_iterations)]
    return [num_channels // num_iterations + int(i < num_channels % num_iterations) for i in range(num_iterations)]


def contributions(x: Tensor, y: Tensor, weight: Tensor, pruned: list[int], calibration: str | None) -> Tensor:
    """What each channel contributes at each token, [T, C], from the vectors themselves: norm2(s + x_c W_c)."""
    residual = x[:, pruned] @ weight[:, pruned].T
    error = residual
    if calibration == "scale_by_magnitude":
        left = y - residual
        error = (left.norm(dim=1) / (y.norm(dim=1) + EPSILON))[:, None] * y - left
    changes = error[:, None, :] + x[:, :, None] * weight.T[None]
    return (changes.square().sum(-1) + EPSILON).sqrt()


def iterative(calls: list[Call], module: nn.Module, calibration: str | None = None) -> dict[str, Tensor]:
    weight = module.weight.detach().double()
    bias = 0 if getattr(module, "bias", None) is None else module.bias.detach().double()
    calls = [call for call in calls if len(counted(call[0], call[2]))]
    order: list[int] = []
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for (x, y, mask), number in zip(calls, schedule(weight.shape[1], len(calls)), strict=True):
        total += contributions(counted(x, mask), counted(y, mask) - bias, weight, order, calibration).mean(0)
        if number:
            left = [channel for channel in range(weight.shape[1]) if channel not in order]
            order += sorted(left, key=lambda channel: (float(total[channel]), channel))[:number]
            total.zero_()
    ascending = torch.tensor(order)
    return {"score": ascending.argsort(), "channels_importance_ascending": ascending}
