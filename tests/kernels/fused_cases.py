"""The fused kernels where triton is on the path and no GPU is: in its interpreter, and compiled for GPUs.

    python -m tests.kernels.fused_cases interpret|compile

Prints one JSON object. A process of its own: beside triton, PyTorch and Megatron-Core behave in another way.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

SHAPES = ((5, 64), (3, 1024), (4, 2500), (1, 1), (0, 8))
ARCHITECTURES = (80, 90, 100)


def oracle(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines of rows [T] in float64, one after the other."""
    rows = [(a.double(), b.double()) for a, b in zip(x, y, strict=True)]
    return torch.tensor([float(a @ b) / max(float(a.norm() * b.norm()), 1e-300) for a, b in rows], dtype=torch.float64)


def interpret() -> dict[str, float]:
    """Return the largest error of each case."""
    from megascore.kernels.fused_cosines import DTYPES, cosines

    found = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            torch.manual_seed(sum(shape))
            # Like a block's input and output: far from the origin, and near each other.
            x = torch.randn(shape) + 3
            wide = torch.stack([x + 0.1 * torch.randn(shape), torch.full(shape, torch.nan)], dim=1)
            x, y = x.to(dtype), wide.to(dtype)[:, 0]
            if len(x) > 2:
                x[1] = 0
            error = (cosines(x, y).double() - oracle(x, y)).abs()
            found[f"{dtype} {shape}"] = float(error.max()) if len(error) else 0.0
    return found


def compiled() -> dict[str, int]:
    """Return the size of the machine code by kind of activation and architecture."""
    triton: Any = __import__("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megascore.kernels.fused_cosines import compile_arguments

    found = {}
    for kind in ("bf16", "fp16", "fp32"):
        kernel, signature, constants = compile_arguments(kind)
        for architecture in ARCHITECTURES:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            found[f"{kind} sm_{architecture}"] = len(binary.asm["cubin"])
    return found


if __name__ == "__main__":
    what = sys.argv[1]
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (what == "interpret")
    print(json.dumps({"interpret": interpret, "compile": compiled}[what]()))
