"""Matrix products with float32 results, at the speed of the factors' own type.

A product of bfloat16 matrices is usually rounded to bfloat16, and one of float16 matrices overflows at 65504: neither
is good enough for a score. Here nothing is rounded or clipped between the activation and the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascore.kernels.exact import cpu_matmul_precision
from megascore.kernels.workspace import Workspace

__all__ = ["Product", "product"]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` [T, N] in float32 (float64 if a factor is), for x [T, K] and weight [K, N]."""
    return Product(x.dtype, weight.dtype, x.device)(x, weight)


class Product:
    """Multiplies matrices that hold values of two given types: float32 results (float64 if a type is).

    A float32 factor beside a bfloat16 one is split into two bfloat16 parts that add up to it to a relative 2^-17: two
    fast products instead of a slow one. On a GPU, float32 factors obey the process's own TF32 setting.
    """

    def __init__(self, x_dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
        """Choose how to multiply values of ``x_dtype`` with values of ``weight_dtype`` on ``device``."""
        dtypes = {x_dtype, weight_dtype}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        is_fast = torch.bfloat16 in dtypes and dtypes <= {torch.bfloat16, torch.float32} and _is_fast(device)
        self._splits_x = is_fast and x_dtype == torch.float32
        self._splits_weight = is_fast and weight_dtype == torch.float32
        self._on_gpu_tensor_cores = is_fast and device.type != "cpu"
        self._on_cpu_tiles = is_fast and device.type == "cpu"
        self.best_dtypes = (x_dtype, weight_dtype) if self._on_gpu_tensor_cores else (self.dtype, self.dtype)
        """Types in which factors are best kept, if they are used more than once: others are converted each time."""

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
        """Return ``x @ weight``, or ``out + x @ weight`` where it is to ``accumulate``.

        Args:
            x: [T, K], of its own type or the best one.
            weight: [K, N], of its own type or the best one.
            out: [T, N] of `dtype`, contiguous: memory that may hold the result, and does if it accumulates.
            accumulate: Whether to add to what ``out`` holds.

        Returns:
            [T, N] of `dtype`.
        """
        if self._on_gpu_tensor_cores:
            result = self._on_gpu(x, weight)
            return out.add_(result) if accumulate and out is not None else result
        x, weight = x.to(self.dtype), weight.to(self.dtype)
        if not self._on_cpu_tiles:
            return _multiply(x, weight, out, accumulate)
        # oneDNN may round float32 factors to bfloat16: it changes nothing in values of bfloat16, and sums are float32.
        with cpu_matmul_precision("bf16"), Workspace(x.device) as workspace:
            if self._splits_x:
                high, low = _high_and_low(x, workspace)
                return _multiply(low, weight, _multiply(high, weight, out, accumulate), True)
            if self._splits_weight:
                high, low = _high_and_low(weight, workspace)
                return _multiply(x, low, _multiply(x, high, out, accumulate), True)
            return _multiply(x, weight, out, accumulate)

    def _on_gpu(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._splits_x:
            both = torch.mm(_two_parts(x, 0), weight, out_dtype=self.dtype)
            return both[: x.shape[0]].add_(both[x.shape[0] :])
        if self._splits_weight:
            both = torch.mm(x, _two_parts(weight, 1), out_dtype=self.dtype)
            return both[:, : weight.shape[1]].add_(both[:, weight.shape[1] :])
        return torch.mm(x, weight, out_dtype=self.dtype)


def _multiply(x: Tensor, weight: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    if out is None:
        return x @ weight
    return out.addmm_(x, weight) if accumulate else torch.mm(x, weight, out=out)


def _high_and_low(x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Return ``x`` float32 rounded to bfloat16, and the rest; both as float32."""
    shape = tuple(x.shape)
    high = workspace.empty(shape, x.dtype).copy_(workspace.empty(shape, torch.bfloat16).copy_(x))
    return high, torch.sub(x, high, out=workspace.empty(shape, x.dtype))


def _two_parts(x: Tensor, dim: int) -> Tensor:
    """Return bfloat16 ``high`` and ``low``, which add up to ``x``, one after the other along ``dim``."""
    high = x.bfloat16()
    return torch.cat([high, (x - high).bfloat16()], dim)


def _is_fast(device: torch.device) -> bool:
    """Say whether this device multiplies bfloat16 with float32 results, and this PyTorch offers it."""
    if device.type in ("cuda", "meta"):
        # The meta device stands for a GPU: what is counted there must be what runs there.
        return hasattr(torch.ops.aten.mm, "dtype")
    has_setting = hasattr(torch.backends.mkldnn, "matmul") and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return device.type == "cpu" and has_setting and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
