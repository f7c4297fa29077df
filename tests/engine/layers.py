"""Workers whose models are made of Transformer Engine's layers, and how to have Megatron's own in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["megatrons_own_layers", "on_megatrons_own_layers", "start"]


def start(engine: Path, megatron: Path | None = None) -> None:
    """Let this worker build models of Transformer Engine's layers; the initializer of a `WorkerPool`.

    Args:
        engine: Folder of Transformer Engine, as `packages` fetches it.
        megatron: Folder of another Megatron-Core than the installed one.
    """
    from tests.engine.shim import install

    if megatron is not None:
        sys.path.insert(0, str(megatron))
    install(engine)
    # First of all of Megatron: it imports it as a machine without GPU and triton can.
    import_module("megascore.mcore")
    from megascore.mcore.compat import has_transformer_engine
    from megascore.mcore.models import spec

    assert has_transformer_engine(), "Megatron found no Transformer Engine"
    # Otherwise they are for CUDA, and for the types that its kernels have.
    spec.uses_transformer_engine = lambda device, dtype: True


@contextmanager
def megatrons_own_layers() -> Iterator[None]:
    """Build models of Megatron's own layers meanwhile, as on machines without Transformer Engine."""
    from megascore.mcore.models import spec

    before = spec.uses_transformer_engine
    spec.uses_transformer_engine = lambda device, dtype: False
    try:
        yield
    finally:
        spec.uses_transformer_engine = before


def on_megatrons_own_layers(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function does with Megatron's own layers."""
    with megatrons_own_layers():
        return function(*args)
