"""The state in which a model is run for measuring, and its return to the one before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

__all__ = ["measuring", "without_compiling"]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no generation caches, nothing compiled; all as before afterwards.

    A cache of keys and values would grow with each time that a block is run on the same inputs.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.no_grad(), without_compiling():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, training in modes:
            module.training = training


def without_compiling() -> AbstractContextManager[object]:
    """Run compiled models and modules uncompiled: their hooks and forward methods of the moment then count."""
    # Where nobody has imported the compiler nothing is compiled, and importing it takes a second and 100 MB.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
