"""Memory for a call's temporaries that the next call uses again.

On a CPU, memory fresh from the system costs more than the arithmetic on it: every page is cleared first. So each thread
keeps one piece for the temporaries of all hooks, from which calls take what they need and give it back. Elsewhere
PyTorch's own allocator does that.
"""

from __future__ import annotations

import threading
from math import prod
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["Workspace"]

CAPACITY = 44 << 20
"""Bytes that a thread keeps at most; the system gives pages when they are first written, so small models keep less."""
ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""


class _Kept(threading.local):
    """What a thread keeps, of which the first ``used`` bytes are taken."""

    def __init__(self) -> None:
        self.used = 0
        self._views: dict[torch.dtype, Tensor] = {}

    def memory(self, dtype: torch.dtype) -> Tensor:
        """Return all of it as numbers of ``dtype``; allocated when it is needed first."""
        if dtype not in self._views:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                if not self._views:
                    self._views[torch.uint8] = torch.empty(CAPACITY, dtype=torch.uint8, device="cpu")
                self._views[dtype] = self._views[torch.uint8].view(dtype)
        return self._views[dtype]


_kept = _Kept()


class Workspace:
    """Temporaries of one call, given back when the context ends; what was taken must not be used after that.

    ::

        with Workspace(x.device) as workspace:
            scratch = workspace.empty((rows, columns), torch.float32)

    Contexts may be nested: the inner one gives back only what was taken in it.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare for temporaries on ``device``; memory is kept for CPUs only."""
        self._device = device

    def __enter__(self) -> Workspace:
        """Remember what others have taken."""
        self._start = _kept.used
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give back what was taken since."""
        _kept.used = self._start

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return contiguous memory of any content; newly allocated where the thread's own is used up."""
        count = prod(shape)
        stop = _kept.used + count * dtype.itemsize
        if self._device.type != "cpu" or stop > CAPACITY:
            return torch.empty(shape, dtype=dtype, device=self._device)
        first = _kept.used // dtype.itemsize
        _kept.used = -(-stop // ALIGNMENT) * ALIGNMENT
        return _kept.memory(dtype)[first : first + count].view(shape)
