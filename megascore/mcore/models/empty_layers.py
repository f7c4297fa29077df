"""Layers without weights, that take no memory until their weights come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

__all__ = ["built_empty", "filled", "on_device"]


@contextmanager
def built_empty() -> Iterator[None]:
    """Whoever builds Megatron's layers inside gets them with parameters on the meta device; `filled` gives real ones.

    Each layer is built as ever, and then its parameters are dropped: one layer takes memory at a time, and buffers keep
    their values. Parameters that a subclass adds after Megatron's own are not dropped.
    """
    build = TransformerLayer.__init__

    @wraps(build)
    def build_and_drop(layer: Any, *args: Any, **kwargs: Any) -> None:
        build(layer, *args, **kwargs)
        for owner in layer.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = _like(parameter, torch.device("meta"))

    TransformerLayer.__init__ = build_and_drop
    try:
        yield
    finally:
        TransformerLayer.__init__ = build


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
