"""Norms that are fused into the linear layer behind them, as in Transformer Engine's LayerNormLinear.

Their output never leaves the kernel, so it is computed again from the module's input; the model's own pass stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megascore.sites.weight_alone import WeightAlone

__all__ = ["fused_norm_output", "has_fused_norm", "norm_module"]


def norm_module(module: nn.Module) -> nn.Module:
    """Return a module whose ``weight`` is the norm's: the norm itself, or a stand-in where it is fused."""
    return WeightAlone(module.layer_norm_weight) if has_fused_norm(module) else module  # type: ignore[arg-type]


def has_fused_norm(module: nn.Module) -> bool:
    """Tell whether a linear layer normalizes its input first."""
    return getattr(module, "layer_norm_weight", None) is not None


def fused_norm_output(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the fused norm gives for ``inputs`` [..., hidden]: in their type, or in that which the weight needs.

    With sequence parallelism the input is this rank's part of the sequence, and so is the result.
    """
    weight: Tensor = module.layer_norm_weight.detach()  # type: ignore[operator]
    bias: Tensor | None = getattr(module, "layer_norm_bias", None)
    eps, hidden = float(module.eps), (weight.numel(),)  # type: ignore[arg-type]
    with torch.no_grad():
        if getattr(module, "zero_centered_gamma", False):
            # As the kernel does it: a bfloat16 weight near 0 would lose most of its digits beside the 1.
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
        is_rms = getattr(module, "normalization", "LayerNorm") == "RMSNorm"
        if weight.dtype == inputs.dtype:
            if is_rms:
                return functional.rms_norm(inputs, hidden, weight, eps)
            return functional.layer_norm(inputs, hidden, weight, None if bias is None else bias.to(weight.dtype), eps)
        normalized = (
            functional.rms_norm(inputs, hidden, None, eps)
            if is_rms
            else functional.layer_norm(inputs, hidden, None, None, eps)
        )
        return (
            normalized * weight if is_rms or bias is None else torch.addcmul(bias.to(weight.dtype), normalized, weight)
        )
