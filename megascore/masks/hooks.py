"""Hooks that change what goes into a module or comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megascore.errors import PlanError

__all__ = ["Undo", "mask_input", "scale_output"]

Undo: TypeAlias = Callable[[], None]
"""Takes back what was done to a model."""


def mask_input(module: nn.Module, masks: Mapping[int, Tensor], scale: float = 1.0) -> Undo:
    """Multiply a module's first argument by a mask over its last dimension, and by a number.

    Args:
        module: Called with a tensor first, or as its only keyword.
        masks: bool [width], by the width of the input.
        scale: The number.
    """
    ready: dict[int, Tensor] = {}

    def masked(tensor: Tensor) -> Tensor:
        width = tensor.shape[-1]
        if width not in masks:
            raise PlanError(
                f"{type(module).__name__} was given {width} channels: expected {' or '.join(map(str, masks))}."
            )
        # A scale rounded to half precision would change every feature by the same part.
        kind = tensor.dtype if scale == 1.0 else torch.promote_types(tensor.dtype, torch.float32)
        if width not in ready or ready[width].device != tensor.device or ready[width].dtype != kind:
            ready[width] = masks[width].to(tensor.device, kind) * scale
        return (tensor * ready[width]).to(tensor.dtype)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (masked(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: masked(kwargs[name])}

    remove: Undo = module.register_forward_pre_hook(before, with_kwargs=True).remove
    return remove


def scale_output(module: nn.Module, mask: Tensor, scale: float) -> Undo:
    """Multiply a module's output, a tensor, by a mask over its last dimension and by a number."""

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        kind = torch.promote_types(first.dtype, torch.float32)
        scaled = (first * (mask.to(first.device, kind) * scale)).to(first.dtype)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    remove: Undo = module.register_forward_hook(behind).remove
    return remove
