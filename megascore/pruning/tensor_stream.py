"""Safetensors files written one tensor at a time: shapes are known before, so the header goes first.

safetensors' own writer takes all tensors of a file at once, which would be most of a model in memory. The format is at
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
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


def write_tensors(path: Path, tensors: Mapping[str, Planned], make: Callable[[str], Tensor]) -> None:
    """Write a file; one tensor at a time is in memory.

    Args:
        path: The file; none is there.
        tensors: What it holds, in this order.
        make: Returns a tensor by its name, as planned, on the CPU.

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
        _write(file.fileno(), len(text).to_bytes(8, "little") + text)
        for name, planned in tensors.items():
            tensor = make(name)
            assert tuple(tensor.shape) == planned.shape, (name, tensor.shape, planned.shape)
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            assert len(values) == planned.num_bytes, (name, tensor.dtype, planned.dtype)
            _write(file.fileno(), values)
        os.fsync(file.fileno())


def _write(descriptor: int, values: bytes | memoryview) -> None:
    left = memoryview(values)
    while len(left):
        left = left[os.write(descriptor, left) :]
