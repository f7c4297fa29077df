"""What the scores must be: float64 formulas on the raw activations of the unsharded model.

Written without the package's hooks, kernels, merging or site discovery, so that agreement means something.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Recorder", "expected_scores"]

LINEARS = {"mlp.linear_fc2": "ffn", "self_attention.linear_proj": "attention_heads"}
NORMS = ("input_layernorm", "pre_mlp_layernorm")


class Recorder:
    """Keeps the raw activations of an unsharded Megatron model, sequence first [S, B, C], call after call."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            if re.fullmatch(
                r"decoder\.layers\.\d+(\..*(linear_fc2|linear_proj|layernorm))?|decoder\.final_layernorm", name
            ):
                module.register_forward_hook(self._keep(name), with_kwargs=True)

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[name].append((args[0] if args else kwargs["hidden_states"]).detach().double().clone())
            self.outputs[name].append((output[0] if isinstance(output, tuple) else output).detach().double().clone())

        return hook


def expected_scores(recorder: Recorder, num_layers: int, head_dim: int) -> dict[str, Tensor]:
    """Scores of the minitron recipe, by the keys of the score file."""
    scores: dict[str, Tensor] = {}
    hidden = _l2_norm(recorder.outputs["decoder.final_layernorm"])
    scores["decoder.final_layernorm/hidden_size/l2_norm"] = hidden
    similarity = []
    for number in range(num_layers):
        layer = f"decoder.layers.{number}"
        for module, target in LINEARS.items():
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
