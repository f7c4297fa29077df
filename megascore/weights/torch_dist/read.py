"""Boxes of tensors, read from the files of a checkpoint without the bytes around them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from io import BufferedReader
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from megascore.errors import ModelError
from megascore.weights.torch_dist.index import CheckpointIndex, StoredPart

__all__ = ["fill_from_part", "overlaps"]

SHORTEST_RUN = 128
"""Bytes that lie together in a file; where a box has shorter runs, all of the stored part is read."""


def overlaps(
    index: CheckpointIndex, name: str, offsets: torch.Size, sizes: torch.Size
) -> Iterator[tuple[StoredPart, tuple[slice, ...], tuple[slice, ...]]]:
    """Find the stored parts that a box of a tensor has something of.

    Args:
        index: Index of the checkpoint.
        name: Name of the tensor.
        offsets: First entry of the box along each dimension of the whole tensor.
        sizes: Sizes of the box.

    Yields:
        A stored part, the place of the common values in it, and their place in the box.
    """
    begins, ends, parts = index.boxes_of(name)
    first = torch.maximum(begins, torch.tensor(offsets, dtype=torch.int64))
    last = torch.minimum(ends, torch.tensor(offsets, dtype=torch.int64) + torch.tensor(sizes, dtype=torch.int64))
    for number in (first < last).all(dim=1).nonzero()[:, 0].tolist():
        part = parts[number]
        common = list(zip(first[number].tolist(), last[number].tolist(), strict=True))
        yield (
            part,
            tuple(slice(low - start, high - start) for (low, high), start in zip(common, part.offsets, strict=True)),
            tuple(slice(low - start, high - start) for (low, high), start in zip(common, offsets, strict=True)),
        )


def fill_from_part(target: Tensor, folder: Path, name: str, part: StoredPart, where: tuple[slice, ...]) -> int:
    """Fill a tensor with the values at ``where`` of a stored part; return bytes read.

    Raises:
        ModelError: the file is missing, damaged, or holds something else.
    """
    place = part.place
    if place is None:
        raise ModelError(f"{folder}/.metadata does not say where '{name}' lies.")
    path = folder / place.relative_path
    try:
        with path.open("rb") as file:
            return _fill(target, file, place, part.sizes, where)
    except OSError as error:
        raise ModelError(f"{path}, which holds '{name}', cannot be read: {error}") from error
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise ModelError(f"{path} cannot be read: '{name}' in it is damaged: {error}") from error


@torch.no_grad()
def _fill(target: Tensor, file: BufferedReader, place: Any, sizes: torch.Size, where: tuple[slice, ...]) -> int:
    # Each part is a file of torch.save of its own; on the meta device its values are not read.
    stored = _load(file, place, "meta")
    if stored.shape != sizes:
        raise ValueError(f"it has shape {list(stored.shape)}, expected {list(sizes)} by the index")
    wanted = stored[where]
    # Not told by older versions of torch.
    begin: int | None = getattr(stored.untyped_storage(), "_checkpoint_offset", None)
    num_together = _num_dims_together(wanted)
    run = wanted.shape[wanted.dim() - num_together :].numel() * wanted.itemsize
    if begin is None or run < min(SHORTEST_RUN, wanted.nbytes):
        target.copy_(_load(file, place, "cpu")[where])
        return stored.nbytes
    in_place = target.device.type == "cpu" and target.dtype == wanted.dtype and target.is_contiguous()
    values = target if in_place else torch.empty(wanted.shape, dtype=wanted.dtype)
    _read_runs(file, place.offset + begin, wanted, wanted.dim() - num_together, values)
    if not in_place:
        target.copy_(values)
    return wanted.nbytes


def _load(file: BufferedReader, place: Any, device: str) -> Tensor:
    tensor = torch.load(
        _create_file_view(file, place.offset, place.length),  # type: ignore[arg-type]
        map_location=device,
        weights_only=True,
    )
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it is a {type(tensor).__name__}")
    return tensor


def _num_dims_together(view: Tensor) -> int:
    """Return how many of the last dimensions lie together in memory."""
    together, step = 0, 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride()), strict=True):
        if size != 1 and stride != step:
            break
        together, step = together + 1, step * size
    return together


def _read_runs(file: BufferedReader, begin: int, view: Tensor, num_outer: int, values: Tensor) -> None:
    """Read what a view of a stored tensor shows, one run of its last dimensions after the other.

    Args:
        file: Holds the tensor's storage.
        begin: First byte of the storage.
        view: The wanted values on the meta device: their places in the storage.
        num_outer: Number of dimensions before those that lie together.
        values: Filled; contiguous, with the shape and type of ``view``.
    """
    # The tensor's own memory, without numpy; `values` outlives it.
    memory = memoryview((ctypes.c_ubyte * values.nbytes).from_address(values.data_ptr()))
    run = view.shape[num_outer:].numel() * view.itemsize
    for number, place in enumerate(product(*map(range, view.shape[:num_outer]))):
        first = view.storage_offset() + sum(index * step for index, step in zip(place, view.stride(), strict=False))
        file.seek(begin + int(first) * view.itemsize)
        if file.readinto(memory[number * run : (number + 1) * run]) != run:
            raise EOFError("the file ends before the tensor does")
