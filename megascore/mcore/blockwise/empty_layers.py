"""Layers without weights, that take no memory until their weights come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

__all__ = ["EmptyTransformerLayer", "filled", "on_device"]


class EmptyTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer with its parameters on the meta device; `filled` gives it real ones for a while."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the layer, and drop its parameters: memory that was never written to, one layer at a time."""
        super().__init__(*args, **kwargs)
        for owner in self.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = _like(parameter, torch.device("meta"))


@contextmanager
def filled(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Give a layer's parameters memory on a device, not initialised; inside, they are its own parameters."""
    empty = [
        (owner, name, parameter)
        for owner in layer.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    try:
        for owner, name, parameter in empty:
            owner._parameters[name] = _like(parameter, device)
        yield
    finally:
        for owner, name, parameter in empty:
            owner._parameters[name] = parameter


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module, but for parameters on the meta device, which stay there."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and tensor.device != device:
            tensor.data = tensor.data.to(device)
    return module


def _like(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a parameter of the same shape, with what Megatron notes on its parameters."""
    other = nn.Parameter(torch.empty_like(parameter.data, device=device), requires_grad=parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    return other
