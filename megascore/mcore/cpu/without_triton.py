"""The import of Megatron-Core 0.18 and later where triton is not installed, as beside CPU builds of torch.

Those versions import triton for kernels that run on GPUs only. `triton_stand_in` answers the imports; a kernel that
were called all the same would fail. Imports no Megatron: it comes before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["triton_stand_in"]

_MODULES = ("triton", "triton.language", "triton.runtime", "triton.runtime.cache")


class _Anything:
    """Takes any arguments: a configuration, a type, or a constant of a kernel."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""


class _StandIn(ModuleType):
    """A module with every name: in kernels that are defined and never run, all of them are decorations."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorator if name in ("jit", "autotune", "heuristics") else _Anything


def _decorator(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Return the function as it is, for a decorator with or without arguments."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        function: Callable[..., Any] = args[0]
        return function
    return lambda function: function


@contextmanager
def triton_stand_in() -> Iterator[None]:
    """Let Megatron-Core be imported without triton; does nothing where triton is installed.

    It is gone afterwards: other libraries, which look for triton to decide what to do, must not find it.
    """
    if "triton" in sys.modules or find_spec("triton") is not None:
        yield
        return
    for name in _MODULES:
        module = _StandIn(name)
        module.__dict__.update(__path__=[], __version__="0.0.0")
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in _MODULES:
            sys.modules.pop(name, None)
