"""JSON lines: one object a line, with a document in one of its fields."""

from __future__ import annotations

from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megascore.data.encoder import Encoder
from megascore.data.source import TokenIds
from megascore.errors import DataError
from megascore.files.json_text import parse_json

__all__ = ["JsonLines"]

BLOCK_BYTES = 1 << 26
NEWLINE = 10


class JsonLines:
    """`Documents` of a file that is mapped into memory: its lines are found first, and parsed when they are used.

    A document is a string, which is tokenized, or a list of token ids. Empty lines are documents without tokens.
    """

    def __init__(self, path: Path, field: str, encoder: Encoder) -> None:
        """Find the lines.

        Raises:
            DataError: the file cannot be read, or is empty.
        """
        self.name = f"JSON lines {path}"
        self._field = field
        self._encoder = encoder
        try:
            if path.stat().st_size == 0:
                raise DataError(f"{self.name} is empty: data.jsonl names a file with a JSON object on each line.")
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}. data.jsonl names a file.") from error
        self._bounds = _line_bounds(self._bytes)

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._bounds) - 1

    def tokens(self, number: int) -> TokenIds:
        """Return the tokens of the document on one line, counted from 0.

        Raises:
            DataError: the line is no JSON object in UTF-8, or the field is missing or of another type.
        """
        where = f"{self.name} line {number + 1}"
        line = self._bytes[self._bounds[number] : self._bounds[number + 1]].tobytes()
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return np.empty(0, dtype=np.int64)
        record = _parse(line, where)
        if self._field not in record:
            raise DataError(
                f"{where}: field '{self._field}' missing; found: {', '.join(map(str, record)) or 'none'}. "
                "data.field names the one with the documents."
            )
        return self._encoder.document(record[self._field], f"{where}: field '{self._field}'")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the line ({error.reason})."
        ) from error
    except JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    except ValueError as error:
        raise DataError(f"{where} cannot be read as JSON: {error}. Mend or drop this line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} holds {type(record).__name__}: expected a JSON object on each line.")
    return record


def _line_bounds(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return where each line begins, and where the last one ends."""
    ends = [
        np.flatnonzero(content[start : start + BLOCK_BYTES] == NEWLINE) + start + 1
        for start in range(0, len(content), BLOCK_BYTES)
    ]
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    return bounds if bounds[-1] == len(content) else np.append(bounds, len(content))
