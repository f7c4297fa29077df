"""The surroundings in which activations are measured, whatever surrounds the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["cpu_matmul_precision", "exact", "unrounded"]

Hook = TypeVar("Hook")
Rest = ParamSpec("Rest")

_cpu_settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
"""Where PyTorch keeps the process's choices for matrix products on a CPU; None before it had such."""


def exact(
    observe: Callable[Concatenate[Hook, Tensor, Rest], None],
) -> Callable[Concatenate[Hook, Tensor, Rest], None]:
    """Run ``observe(self, inputs, ...)`` without gradients, and with arithmetic that is `unrounded`.

    And outside of inference mode: what a tensor made there holds could not be added to in a later step.
    """

    @wraps(observe)
    def run(self: Hook, inputs: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> None:
        plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if plain and _is_unrounded(inputs.device):
            observe(self, inputs, *args, **kwargs)
            return
        with torch.inference_mode(False), torch.no_grad(), unrounded(inputs.device):
            observe(self, inputs, *args, **kwargs)

    return run


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
    if torch.is_autocast_enabled(device.type):
        return False
    return device.type != "cpu" or getattr(_cpu_settings, "fp32_precision", "none") in ("none", "ieee")
