"""Safetensors files written block by block: shapes are known before, so the header goes first.

safetensors' own writer takes all tensors of a file at once, which would be most of a model in memory. The format is at
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Planned", "write_tensors"]

BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Planned(NamedTuple):
    """A tensor that is to be written."""

    dtype: str
    """As safetensors writes it, such as ``BF16``."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * BYTES_OF[self.dtype]


def write_tensors(path: Path, tensors: Mapping[str, Planned], make: Callable[[str], Iterable[Tensor]]) -> None:
    """Write a file; one block at a time is in memory.

    Args:
        path: The file; none is there.
        tensors: What it holds, in this order.
        make: Returns the values of a tensor by its name, in order, as tensors on the CPU. Each is written while the
            next one is made, so two of them must be valid at a time.

    Raises:
        OSError: the system refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, planned in tensors.items():
        begin, end = end, end + planned.num_bytes
        header[name] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Values start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        # All at once: a full disk is told before anything is computed, and blocks need not be found one by one.
        _reserve(file.fileno(), 8 + len(text) + end)
        _write(file.fileno(), len(text).to_bytes(8, "little") + text)
        with _Writer(file.fileno()) as writer:
            for name, planned in tensors.items():
                num_bytes = 0
                for block in make(name):
                    values = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    writer.write(values)
                    num_bytes += len(values)
                assert num_bytes == planned.num_bytes, (name, planned, num_bytes)
        os.fsync(file.fileno())


class _Writer:
    """Writes a block while the next one is made."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if self._last is not None and kind is None:
            self._last.result()

    def write(self, values: memoryview) -> None:
        """Wait for the block before, and begin with this one.

        Raises:
            OSError: the block before could not be written.
        """
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(_write, self._descriptor, values)


def _reserve(descriptor: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        # Some file systems, such as tmpfs of old kernels and NFS before 4.2, have no such call.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write(descriptor: int, values: bytes | memoryview) -> None:
    left = memoryview(values)
    while len(left):
        left = left[os.write(descriptor, left) :]
