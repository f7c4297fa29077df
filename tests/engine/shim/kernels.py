"""The kernels of Transformer Engine that its unquantized layers call, in plain PyTorch.

Signatures, and shapes of what is returned, are those of the real ones. Theirs add up in float32; so do these, and in
float64 where a tensor is float64, which the real ones refuse: so layouts can be compared to the last digits. Anything
that has to do with fewer than 16 bits, with communication inside of a product, or with fused activations is refused.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OF_THE_SHIM",
    "DType",
    "generic_gemm",
    "get_cublasLt_version",
    "get_cudnn_version",
    "get_num_cublas_streams",
    "layernorm_bwd",
    "layernorm_fwd",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "take_float64",
    "te_general_grouped_gemm",
]
OF_THE_SHIM = ("OF_THE_SHIM", "take_float64")
"""Names of this module that the extension does not have."""


class DType(enum.IntEnum):
    """Numbers of types, as the extension has them."""

    # ruff: noqa: N815 - the extension's names
    kByte, kInt32, kFloat32, kFloat16, kBFloat16 = 0, 2, 4, 5, 6
    kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = 7, 8, 10


TORCH_DTYPES: dict[Any, torch.dtype] = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def take_float64(numbers_of_types: dict[Any, Any]) -> None:
    """Give float64 a number in the package's table of types, which these kernels know: the type itself."""
    numbers_of_types[torch.float64] = torch.float64
    TORCH_DTYPES[torch.float64] = torch.float64


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: None,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """Return the normalized rows of x [T, C], None, and one over each row's root mean square [T]."""
    assert quantizer is None, "the shim has no quantized outputs"
    wide = _wide(x)
    rsigma = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rsigma.unsqueeze(-1) * _gamma(weight, zero_centered_gamma)
    return _give(out, y.to(TORCH_DTYPES[otype])), None, rsigma


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: None,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized rows of x [T, C], their means [T], and one over each row's deviation [T]."""
    assert quantizer is None, "the shim has no quantized outputs"
    wide = _wide(x)
    mu = wide.mean(-1)
    rsigma = torch.rsqrt(wide.var(-1, unbiased=False) + eps)
    y = (wide - mu.unsqueeze(-1)) * rsigma.unsqueeze(-1) * _gamma(weight, zero_centered_gamma) + _wide(bias)
    return _give(out, y.to(TORCH_DTYPES[otype])), mu, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [T, C] and of the weight [C]."""
    normalized = _wide(x) * rsigma.unsqueeze(-1)
    scaled = _wide(dz) * _gamma(weight, zero_centered_gamma)
    dx = (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)) * rsigma.unsqueeze(-1)
    return dx.to(x.dtype), (_wide(dz) * normalized).sum(0).to(weight.dtype)


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [T, C], of the weight [C] and of the bias [C]."""
    normalized = (_wide(x) - mu.unsqueeze(-1)) * rsigma.unsqueeze(-1)
    scaled = _wide(dz) * _gamma(weight, zero_centered_gamma)
    inside = scaled - scaled.mean(-1, keepdim=True) - normalized * (scaled * normalized).mean(-1, keepdim=True)
    sums = (_wide(dz) * normalized).sum(0), _wide(dz).sum(0)
    return (inside * rsigma.unsqueeze(-1)).to(x.dtype), sums[0].to(weight.dtype), sums[1].to(weight.dtype)


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    D: Tensor | None,
    quantizer: None,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: None = None,
    comm_type: None = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return B times A, each transposed where asked for, and the gradient of the bias with ``grad``.

    cuBLAS counts columns first, so that A is the weight [out, in], transposed, in a forward pass.
    """
    assert quantizer is None, "the shim has no quantized outputs"
    assert comm_overlap is None, "the shim has no communication in products"
    assert not gelu, "the shim has no fused activations"
    assert alpha == 1.0
    dtype = B.dtype if out_dtype is None else TORCH_DTYPES[out_dtype]
    y = _product(A, transa, B, transb, None if grad else bias, dtype)
    y = D.add_(y.view_as(D)) if D is not None and accumulate else _give(D, y)
    return y, (B.reshape(-1, B.shape[-1]).sum(0) if grad and bias is not None else None), gelu_in, extra_output


def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    D: Sequence[Tensor],
    D_type: Any,
    m_splits: Sequence[int] | None,
    bias: Sequence[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """Write each product into the outputs D, or into rows of the first one; return the biases, or their gradients."""
    outputs = D[0].split(list(m_splits)) if single_output and m_splits is not None else D
    for a, b, d, one in zip(A, B, outputs, bias, strict=True):
        if grad and one.numel():
            one.copy_(b.reshape(-1, b.shape[-1]).sum(0))
        if b.numel() and d.numel():
            y = _product(a, transa, b, transb, None if grad else one, d.dtype)
            d.add_(y) if accumulate else d.copy_(y)
        elif not accumulate:
            d.zero_()
    return bias


def get_cudnn_version() -> int:
    """Return a version as new as the package asks for anywhere."""
    return 91500


def get_cublasLt_version() -> int:  # noqa: N802 - the extension's name
    """Return a version as new as the package asks for anywhere."""
    return 130100


def get_num_cublas_streams() -> int:
    """Return how many workspaces grouped products get."""
    return 4


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return _wide(weight) + 1 if zero_centered else _wide(weight)


def _give(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result.view_as(out))


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = B.reshape(-1, B.shape[-1])
    y = (rows.T if transb else rows) @ (A.T if transa else A)
    if bias is not None and bias.numel():
        y = y + bias
    return y.to(dtype) if transb else y.to(dtype).reshape(*B.shape[:-1], y.shape[-1])
