"""Megatron's indexed datasets: token ids in ``{prefix}.bin``, and where each document is in ``{prefix}.idx``.

Read here without Megatron, which may not be installed. The index holds, little-endian: ``MMIDIDX`` and two zero bytes;
the version 1, uint64; the code of the tokens' type, uint8; the numbers of sequences and of document bounds, uint64
each; then the lengths of the sequences, int32; their places in the data file in bytes, int64; and the numbers of the
sequences at which documents begin, int64, with the number of all sequences at the end. Multimodal datasets have one
byte more for each sequence, which is not used here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megascore.data.source import TokenIds
from megascore.errors import DataError

__all__ = ["MegatronDataset"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
INTEGERS = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
FLOATS = {6: "float64", 7: "float32"}


class MegatronDataset:
    """`Documents` of an indexed dataset; both files are mapped into memory."""

    def __init__(self, prefix: Path) -> None:
        """Open the two files and check one against the other.

        Raises:
            DataError: a file is missing, damaged, of another version, or does not hold token ids.
        """
        self.name = f"Megatron dataset {prefix}"
        index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        index = _map(index_path, np.dtype(np.uint8))
        dtype, num_sequences, num_bounds = _read_header(index, index_path)
        expected = HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
        if len(index) < expected or num_bounds < 1:
            raise DataError(
                f"{index_path} has {len(index)} bytes, but {num_sequences} sequences in {max(0, num_bounds - 1)} "
                f"documents need {expected}: the file is cut off."
            )
        offset = HEADER.size
        self._lengths = _array(index, "<i4", num_sequences, offset)
        pointers = _array(index, "<i8", num_sequences, offset + 4 * num_sequences)
        self._places = pointers // dtype.itemsize
        self._bounds = _array(index, "<i8", num_bounds, offset + 12 * num_sequences)
        self._data: TokenIds = _map(data_path, dtype)
        self._check(index_path, data_path)
        _check_pointers(pointers, self._lengths, dtype.itemsize, index_path)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._bounds) - 1

    def tokens(self, number: int) -> TokenIds:
        """Return the tokens of one document, all of its sequences."""
        first, last = int(self._bounds[number]), int(self._bounds[number + 1])
        parts = [
            self._data[place : place + length]
            for place, length in zip(self._places[first:last], self._lengths[first:last], strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self._data[:0]

    def _check(self, index_path: Path, data_path: Path) -> None:
        num_sequences, bounds = len(self._lengths), self._bounds
        if bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
            raise DataError(
                f"{index_path}: the documents' bounds run from {bounds[0]} to {bounds[-1]}, expected ascending numbers "
                f"from 0 to {num_sequences}, the number of sequences."
            )
        ends = self._places + self._lengths
        if num_sequences and (self._lengths.min() < 0 or self._places.min() < 0 or ends.max() > len(self._data)):
            raise DataError(
                f"{data_path} has {len(self._data)} tokens of type {self._data.dtype}, but its index goes to "
                f"{ends.max()}: the files are not of one dataset, or the data is cut off."
            )


def _check_pointers(
    pointers: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], token_bytes: int, path: Path
) -> None:
    """Check that each sequence begins where the one before it ends, as every writer of the format puts them."""
    expected = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=expected[1:])
    expected *= token_bytes
    wrong = np.flatnonzero(pointers != expected)
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{path}: sequence {first} begins at byte {pointers[first]}, expected {expected[first]}, where the one "
            f"before it ends ({token_bytes} bytes a token): the index is damaged. Write the dataset again."
        )


def _read_header(index: npt.NDArray[np.uint8], path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return the type of the tokens, the number of sequences, and that of document bounds."""
    header = index[: HEADER.size].tobytes()
    if not header.startswith(MAGIC) or len(header) < HEADER.size:
        raise DataError(f"{path} is no index of a Megatron dataset: it begins with {header[:9]!r}, expected {MAGIC!r}.")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{path} is of version {version}: expected 1, the only one of Megatron's indexed datasets.")
    if code not in INTEGERS:
        raise DataError(
            f"{path}: the data is of type {FLOATS.get(code, f'number {code}')}, expected token ids: "
            f"one of {', '.join(INTEGERS.values())}."
        )
    return np.dtype(INTEGERS[code]).newbyteorder("<"), num_sequences, num_bounds


def _array(index: npt.NDArray[np.uint8], dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    return np.frombuffer(index, dtype=dtype, count=count, offset=offset)


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        num_items = path.stat().st_size // dtype.itemsize
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=dtype, mode="r", shape=(num_items,)) if num_items else np.empty(0, dtype)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. data.megatron names the two files without .bin and .idx."
        ) from error
