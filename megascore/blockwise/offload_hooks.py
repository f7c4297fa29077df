"""Hooks of accelerate that move weights or inputs by themselves, and stay silent while something else moves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["REMOVE_HOOKS", "has_offload_hook", "moving_hooks_silent"]

REMOVE_HOOKS = "accelerate.hooks.remove_hook_from_submodules(model)"


@contextmanager
def moving_hooks_silent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run modules without those hooks that bring their weights, or send their inputs to another device.

    Such a hook puts new tensors into the module after each call, so that those noted before it are no longer there.
    Hooks of a model that is on the compute device as a whole change nothing, and work on.

    Args:
        model: All of it.
        device: The compute device, where weights and inputs are brought by others.
    """
    wrapped: list[tuple[Any, Any]] = []
    try:
        modules: list[Any] = list(model.modules())
        for module in modules:
            # Where accelerate keeps the forward method that it has wrapped.
            if hasattr(module, "_old_forward") and any(_moves(hook, device) for hook in _hooks(module)):
                wrapped.append((module, module.forward))
                module.forward = module._old_forward
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


def has_offload_hook(module: nn.Module) -> bool:
    """Return whether a hook takes the weights of a module, or of one inside it, away while it does not run."""
    return any(_offloads(hook) for own in module.modules() for hook in _hooks(own))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that accelerate has put on a module: known by their attributes, as it need not be installed."""
    waiting = [getattr(module, "_hf_hook", None)]
    for hook in waiting:
        # Several hooks of one module are held by a SequentialHook.
        waiting.extend(getattr(hook, "hooks", ()))
        if hook is not None:
            yield hook


def _offloads(hook: Any) -> bool:
    # AlignDevicesHook says so; CpuOffload, which has no such attribute, always does.
    return hasattr(hook, "execution_device") and bool(getattr(hook, "offload", True))


def _moves(hook: Any, device: torch.device) -> bool:
    own = getattr(hook, "execution_device", None)
    return _offloads(hook) or (own is not None and not _is_same(own, device))


def _is_same(own: int | str | torch.device, device: torch.device) -> bool:
    # A number is an accelerator's; a name without a number is the first of its kind here, as accelerate has it.
    if isinstance(own, int):
        return device.type != "cpu" and (device.index or 0) == own
    named = torch.device(own)
    return named.type == device.type and (named.index or 0) == (device.index or 0)
