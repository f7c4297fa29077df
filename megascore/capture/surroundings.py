"""The state in which a model is run for measuring, and its return to the one before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from megascore.capture.caches import without_caches

__all__ = ["is_compiled", "measuring", "without_compiling"]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no generation caches, nothing compiled; all as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), without_caches(model), without_compiling():
            yield
    finally:
        for module, training in modes:
            module.training = training


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model, or a module in it, was compiled: by `torch.compile`, or in place by `nn.Module.compile`."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def without_compiling() -> AbstractContextManager[object]:
    """Run compiled models and modules uncompiled: their hooks and forward methods of the moment then count."""
    # Where nobody has imported the compiler nothing is compiled, and importing it takes a second and 100 MB.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
