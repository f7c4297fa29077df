"""Importing Megatron-Core 0.15 where torch is built for CUDA and the machine has no GPU, as on a login node.

That version compiles a CUDA allocator when it is imported, and does without it where that fails with a RuntimeError.
Where there is a compiler and no GPU to compile for, torch fails with an IndexError. Imports no Megatron: it comes
before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

__all__ = ["nothing_compiled_for_cuda"]


@contextmanager
def nothing_compiled_for_cuda() -> Iterator[None]:
    """Have attempts to compile for CUDA refused in the way that Megatron expects; does nothing where there is a GPU."""
    if torch.version.cuda is None or torch.cuda.is_available():
        yield
        return
    from torch.utils import cpp_extension

    load_before = cpp_extension.load_inline
    setattr(cpp_extension, "load_inline", _refuse)  # noqa: B010 - mypy takes no assignment to a function
    try:
        yield
    finally:
        setattr(cpp_extension, "load_inline", load_before)  # noqa: B010


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("there is no GPU to compile for")
