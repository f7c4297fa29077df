"""Models in evaluation mode, for as long as any run scores them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["Evaluation"]


@dataclass
class _Mode:
    was_training: bool
    num_holders: int = 0


class _Eager:
    """Lets compiled modules run as they are written while anybody wants it; for the whole process."""

    def __init__(self) -> None:
        self._num_holders = 0
        self._stance: Any = None

    def hold(self) -> None:
        if not self._num_holders:
            self._stance = torch.compiler.set_stance("force_eager")
        self._num_holders += 1

    def release(self) -> None:
        self._num_holders -= 1
        if not self._num_holders:
            self._stance.__exit__(None, None, None)


_modes: WeakKeyDictionary[nn.Module, _Mode] = WeakKeyDictionary()
_eager = _Eager()


class Evaluation:
    """Holds modules in evaluation mode until it is released; several may hold the same ones.

    What the modules were before the first came is what they are after the last has gone, in whatever order they go.
    Modules compiled with ``torch.compile`` run eagerly meanwhile: what was compiled before hooks came does not call
    them, and what was compiled with them calls them when they are gone.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        """Put the models, with everything inside, in evaluation mode."""
        # A module of two models, such as a shared embedding, is held once.
        self._modules = list(dict.fromkeys(module for model in models for module in model.modules()))
        for module in self._modules:
            mode = _modes.setdefault(module, _Mode(module.training))
            mode.num_holders += 1
            module.training = False
        self._is_eager = any(_is_compiled(module) for module in self._modules)
        if self._is_eager:
            _eager.hold()

    def release(self) -> None:
        """Restore the modes where nobody else holds them; can be repeated."""
        for module in self._modules:
            mode = _modes[module]
            mode.num_holders -= 1
            if not mode.num_holders:
                module.training = mode.was_training
                del _modes[module]
        self._modules = []
        if self._is_eager:
            self._is_eager = False
            _eager.release()


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether it came from ``torch.compile(module)``, or ``module.compile()`` was called."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
