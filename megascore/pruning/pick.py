"""The entries of a tensor that stay, block by block: rows are read into one buffer, and picked into another.

Reading through a mapping of the file, and making a new tensor for each, take several times as long: the system then
makes memory page by page. Values are moved as whole numbers of their size, whatever they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from megascore.errors import ModelError
from megascore.plans.kept_tensors import Entries, KeptTensor
from megascore.weights.huggingface.folder import StoredTensor

__all__ = ["Picker"]

BLOCK_BYTES = 1 << 22
"""Large beside what a system call costs, small beside one tensor; what was read is still in a cache as it is picked."""
WHOLE_NUMBERS = {"F64": torch.int64, "F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


class _Buffer:
    """Memory that is kept, as pages that are new to a process cost more than what is done with them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, num_bytes: int) -> Tensor:
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]


class _Buffers:
    def __init__(self) -> None:
        self.read, self.rows, self.picked = _Buffer(), _Buffer(), _Buffer()


class _Index(NamedTuple):
    """Entries that stay, as kernels take them."""

    numbers: Tensor
    ascending: bool


def _index(numbers: tuple[int, ...]) -> _Index:
    index = torch.tensor(numbers)
    return _Index(index, bool((index[1:] > index[:-1]).all()))


class Picker:
    """Reads tensors of a checkpoint's files and gives what stays of them. Close it, or use it in ``with``."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Open nothing yet.

        Args:
            tensors: Where each tensor is, by its stored name.
        """
        self._tensors = tensors
        self._files: dict[Path, IO[bytes]] = {}
        self._stack = ExitStack()
        self._buffers = (_Buffers(), _Buffers())
        # Gate, up and down projection of a layer keep the same entries, and all layers the same hidden features.
        self._index: Callable[[tuple[int, ...]], _Index] = lru_cache(maxsize=16)(_index)

    def __enter__(self) -> Picker:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    def blocks(self, tensor: KeptTensor, stored_name: str) -> Iterator[Tensor]:
        """Yield what stays of a tensor as flat blocks of whole numbers, in order; two are valid at a time.

        Args:
            tensor: What is wanted.
            stored_name: What the parent's tensor is called in its file.

        Raises:
            ModelError: the file has become shorter.
            OSError: the system refuses.
        """
        stored = self._tensors[stored_name]
        if tensor.experts is None:
            rows, columns = (*tensor.entries, None)[:2] if len(stored.shape) == 2 else (None, None)
            if len(stored.shape) == 1:
                # A vector is one row.
                yield from self._matrix(stored, 0, (1, stored.shape[0]), None, tensor.entries[0])
            else:
                yield from self._matrix(stored, 0, (stored.shape[0], stored.shape[1]), rows, columns)
            return
        _, num_rows, num_columns = stored.shape
        for expert, (rows, columns) in tensor.experts:
            yield from self._matrix(stored, expert * num_rows * num_columns, (num_rows, num_columns), rows, columns)

    def _matrix(
        self, stored: StoredTensor, offset: int, shape: tuple[int, int], rows: Entries, columns: Entries
    ) -> Iterator[Tensor]:
        """Yield the kept rows and columns of a matrix that begins so many values into a tensor."""
        num_rows, num_columns = shape
        index = None if columns is None else self._index(columns).numbers
        row_bytes = num_columns * WHOLE_NUMBERS[stored.dtype].itemsize
        begin = stored.begin + offset * WHOLE_NUMBERS[stored.dtype].itemsize
        kept, ascending = (None, True) if rows is None else self._index(rows)
        # Rows in another order are found where the whole matrix is.
        step = max(1, BLOCK_BYTES // row_bytes) if ascending else num_rows
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            own = kept if kept is None or not ascending else kept[(kept >= start) & (kept < stop)] - start
            if own is not None and not len(own):
                continue
            block = self._read(stored, begin + start * row_bytes, stop - start, num_columns)
            yield self._pick(block, own, index).view(-1)

    def _read(self, stored: StoredTensor, begin: int, num_rows: int, num_columns: int) -> Tensor:
        kind = WHOLE_NUMBERS[stored.dtype]
        wanted = num_rows * num_columns * kind.itemsize
        # What was yielded last may still be on its way into a file.
        self._buffers = self._buffers[::-1]
        buffer = self._buffers[0].read.of(wanted)
        if stored.path not in self._files:
            self._files[stored.path] = self._stack.enter_context(stored.path.open("rb", buffering=0))
        file, view = self._files[stored.path], buffer.numpy().data
        file.seek(begin)
        done = 0
        while done < wanted:
            got = file.readinto(view[done:])  # type: ignore[attr-defined]  # a raw file has it
            if not got:
                raise ModelError(f"{stored.path} ends before its tensors do: it has changed while it was read.")
            done += got
        return buffer.view(kind).view(num_rows, num_columns)

    def _pick(self, block: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        buffers, kind = self._buffers[0], block.dtype
        if rows is not None:
            own = buffers.rows.of(len(rows) * block.shape[1] * kind.itemsize).view(kind).view(len(rows), -1)
            block = torch.index_select(block, 0, rows, out=own)
        if columns is None:
            return block
        picked = buffers.picked.of(block.shape[0] * len(columns) * kind.itemsize).view(kind).view(len(block), -1)
        # Several times as fast as index_select along the last dimension.
        return torch.gather(block, 1, columns.expand(block.shape[0], -1), out=picked)
