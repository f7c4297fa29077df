"""The surroundings in which activations are measured, whatever surrounds the forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["cpu_matmul_precision", "exact", "is_recomputation", "never_compiled", "unrounded"]

Hook = TypeVar("Hook")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")

_cpu_settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""Where PyTorch keeps the process's choices for matrix products on a CPU; None before it had such."""


def exact(
    observe: Callable[Concatenate[Hook, Tensor, Rest], None],
) -> Callable[Concatenate[Hook, Tensor, Rest], None]:
    """Run ``observe(self, inputs, ...)`` without gradients, and with arithmetic that is `unrounded`.

    It is never compiled, and what a backward pass computes again has no part in it.
    """

    @never_compiled
    @wraps(observe)
    def run(self: Hook, inputs: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> None:
        if is_recomputation():
            return
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and _is_unrounded(inputs.device):
            observe(self, inputs, *args, **kwargs)
            return
        # What is made in inference mode, and kept, could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad(), unrounded(inputs.device):
            observe(self, inputs, *args, **kwargs)

    return run


def never_compiled(function: Callable[Rest, Result]) -> Callable[Rest, Result]:
    """Keep ``function`` out of what ``torch.compile`` makes of a model that calls it.

    Compiled hooks gave other numbers: their temporaries share memory, of which the compiler knows nothing.
    """
    if "torch._dynamo" in sys.modules:
        return _disabled(function)
    outside: list[Callable[Rest, Result]] = []

    @wraps(function)
    def run(*args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        # Without it nothing has been compiled, and importing it takes longer than importing PyTorch.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not outside:
            outside.append(_disabled(function))
        return outside[0](*args, **kwargs)

    return run


def _disabled(function: Callable[Rest, Result]) -> Callable[Rest, Result]:
    disabled: Callable[Rest, Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def is_recomputation() -> bool:
    """Tell whether a backward pass runs: a forward pass in it is one that activation checkpointing does again."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def unrounded(device: torch.device) -> Iterator[None]:
    """Let sums and products be in the types of their factors, whatever the process has chosen for its model.

    A forward pass under autocast would round those of the hooks, too; and so would
    ``torch.set_float32_matmul_precision("medium")`` on a CPU, where products with ones add up what float32 holds. On a
    GPU float32 products obey the process's TF32 setting, as the layer's own do.
    """
    with ExitStack() as stack:
        if not _is_unrounded(device):
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cpu" and hasattr(_cpu_settings, "fp32_precision"):
                stack.enter_context(cpu_matmul_precision("ieee"))
        yield


@contextmanager
def cpu_matmul_precision(precision: str) -> Iterator[None]:
    """Let float32 products on the CPU be computed as ``precision`` says: "ieee" or "bf16". For the whole process."""
    before = _cpu_settings.fp32_precision
    _cpu_settings.fp32_precision = precision
    try:
        yield
    finally:
        _cpu_settings.fp32_precision = before


def _is_unrounded(device: torch.device) -> bool:
    """Say whether nothing has to be set for `unrounded`; asked before each call, and cheap."""
    # Tensors of a dry run are on the meta device, which autocast does not know.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return False
    return device.type != "cpu" or getattr(_cpu_settings, "fp32_precision", "none") in ("none", "ieee")
