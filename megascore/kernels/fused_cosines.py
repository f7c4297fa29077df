"""The cosines of pairs of rows in one kernel that reads each of both once: for CUDA, where triton is installed.

In PyTorch's own operators it takes float32 copies and products between small kernels, which move ten times as many
bytes (``tests/benchmarks/gpu_traffic.py``). `megascore.kernels.pairs_of_rows` chooses between the two.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_fuse", "compile_arguments", "cosines"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Activations whose sums are float32; those in float64 go to PyTorch's operators."""
BLOCK = 1024
"""Columns that are read at once: each lane adds few numbers, one after the other, and the lanes are added in pairs, so
that the error of a float32 sum stays at a few roundings."""
NUM_WARPS = 4

tl: Any = None
"""Module ``triton.language``, as the kernel below calls it; `_kernel` puts it here."""


def can_fuse(x: Tensor, y: Tensor) -> bool:
    """Tell whether `cosines` takes these matrices: on CUDA, with triton, columns side by side, sums in float32."""
    return (
        x.device.type == y.device.type == "cuda"
        and all(matrix.dtype in DTYPES and matrix.stride(1) == 1 for matrix in (x, y))
        and _has_triton()
    )


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row of ``x`` with that of ``y``: [T] float32; 0 where one of them is all zeros.

    Not collective. The same numbers in every call: no atomic additions.

    Args:
        x: [T, H] of one of `DTYPES`, columns side by side, rows anywhere.
        y: The same shape.
    """
    found = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _kernel()[(len(x),)](x, y, found, x.stride(0), y.stride(0), x.shape[1], BLOCK=BLOCK, num_warps=NUM_WARPS)
    return found


def compile_arguments(kind: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Return the kernel, its signature and its constants, to compile it where no GPU is.

    Args:
        kind: Of the activations, as triton calls it: ``bf16``, ``fp16``, ``fp32``.
    """
    pointers = {"x": f"*{kind}", "y": f"*{kind}", "found": "*fp32"}
    numbers = {"stride_x": "i64", "stride_y": "i64", "num_columns": "i32", "BLOCK": "constexpr"}
    return _kernel(), {**pointers, **numbers}, {"BLOCK": BLOCK}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _kernel() -> Any:
    global tl
    tl = import_module("triton.language")
    return import_module("triton").jit(_cosine_of_row)


# Triton looks at every name in a signature, and takes none but its own.
def _cosine_of_row(x, y, found, stride_x, stride_y, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: an activation can have more numbers than 32 count.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    squares_x = tl.zeros([BLOCK], dtype=tl.float32)
    squares_y = tl.zeros([BLOCK], dtype=tl.float32)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        there = start + columns < num_columns
        a = tl.load(x + row * stride_x + start + columns, mask=there, other=0.0).to(tl.float32)
        b = tl.load(y + row * stride_y + start + columns, mask=there, other=0.0).to(tl.float32)
        squares_x += a * a
        squares_y += b * b
        products += a * b
    norms = tl.sqrt(tl.sum(squares_x, axis=0)) * tl.sqrt(tl.sum(squares_y, axis=0))
    # The smallest normal float32, as in PyTorch's form.
    tl.store(found + row, tl.sum(products, axis=0) / tl.maximum(norms, 1.1754943508222875e-38))
