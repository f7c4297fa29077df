"""Norms that are fused into the linear layer behind them, as in Transformer Engine's LayerNormLinear.

Their output never leaves the kernel, so it is computed again from the module's input; the model's own pass stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WeightAlone", "fused_norm_output", "has_fused_norm", "norm_module"]


class WeightAlone(nn.Module):
    """A module with a weight and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        """Take the weight as it is, with the marks that are on it."""
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def norm_module(module: nn.Module) -> nn.Module:
    """Return a module whose ``weight`` is the norm's: the norm itself, or a stand-in where it is fused."""
    return WeightAlone(module.layer_norm_weight) if has_fused_norm(module) else module  # type: ignore[arg-type]


def has_fused_norm(module: nn.Module) -> bool:
    """Tell whether a linear layer normalizes its input first."""
    return getattr(module, "layer_norm_weight", None) is not None


def fused_norm_output(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the fused norm gives for ``inputs`` [..., hidden], in the type of ``inputs``.

    With sequence parallelism the input is this rank's part of the sequence, and so is the result.
    """
    weight: Tensor = module.layer_norm_weight  # type: ignore[assignment]
    if getattr(module, "zero_centered_gamma", False):
        weight = weight + 1
    hidden = (weight.numel(),)
    eps = float(module.eps)  # type: ignore[arg-type]
    with torch.no_grad():
        if getattr(module, "normalization", "LayerNorm") == "RMSNorm":
            return functional.rms_norm(inputs, hidden, weight.to(inputs.dtype), eps)
        bias: Tensor | None = module.layer_norm_bias  # type: ignore[assignment]
        bias = None if bias is None else bias.to(inputs.dtype)
        return functional.layer_norm(inputs, hidden, weight.to(inputs.dtype), bias, eps)
