"""The surroundings in which activations are measured, whatever surrounds the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact"]

Hook = TypeVar("Hook")
Rest = ParamSpec("Rest")


def exact(
    observe: Callable[Concatenate[Hook, Tensor, Rest], None],
) -> Callable[Concatenate[Hook, Tensor, Rest], None]:
    """Run ``observe(self, inputs, ...)`` without gradients and without autocast.

    A forward pass under autocast would round the sums and products of the hooks, too.
    """

    @wraps(observe)
    def run(self: Hook, inputs: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> None:
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            observe(self, inputs, *args, **kwargs)

    return run
