"""Matrix products with float32 results, at the speed of the factors' own type.

A product of bfloat16 matrices is usually rounded to bfloat16, and one of float16 matrices overflows at 65504: neither
is good enough for a score. Here nothing is rounded or clipped between the activation and the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["product"]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` in float32 (float64 if a factor is), accumulated in it too.

    A float32 factor beside a bfloat16 one is split into two bfloat16 parts that add up to it to a relative 2^-17: two
    fast products instead of a slow one.

    Args:
        x: [T, K].
        weight: [K, N].

    Returns:
        [T, N]. On a GPU, float32 factors obey the process's own TF32 setting.
    """
    dtypes = {x.dtype, weight.dtype}
    if torch.float64 in dtypes:
        return x.double() @ weight.double()
    if torch.bfloat16 not in dtypes or not dtypes <= {torch.bfloat16, torch.float32}:
        return x.float() @ weight.float()
    if not _multiplies_bfloat16(x.device):
        return x.float() @ weight.float()
    if x.dtype == torch.float32:
        both = _bfloat16_product(_two_parts(x, 0), weight)
        return both[: x.shape[0]].add_(both[x.shape[0] :])
    if weight.dtype == torch.float32:
        both = _bfloat16_product(x, _two_parts(weight, 1))
        return both[:, : weight.shape[1]].add_(both[:, weight.shape[1] :])
    return _bfloat16_product(x, weight)


def _two_parts(x: Tensor, dim: int) -> Tensor:
    """Return bfloat16 ``high`` and ``low``, which add up to ``x``, one after the other along ``dim``."""
    high = x.bfloat16()
    return torch.cat([high, (x - high).bfloat16()], dim)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether this device multiplies bfloat16 with float32 results, and this PyTorch offers it."""
    if device.type == "cuda":
        return hasattr(torch.ops.aten.mm, "dtype")
    has_setting = hasattr(torch.backends.mkldnn, "matmul") and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return device.type == "cpu" and has_setting and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _bfloat16_product(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type == "cuda":
        return torch.mm(x, weight, out_dtype=torch.float32)
    # Values of bfloat16 stay what they are when oneDNN rounds its float32 inputs to bfloat16, and the sum is float32.
    with _cpu_matmul_precision("bf16"):
        return x.float() @ weight.float()


@contextmanager
def _cpu_matmul_precision(precision: str) -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
