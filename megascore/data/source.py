"""The contents of every format: a stream of tokens, or documents of them; read only where they are used."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from megascore.errors import DataError

__all__ = ["Documents", "Stream", "TokenIds", "ids_of_list"]

TokenIds: TypeAlias = npt.NDArray[np.integer[Any]]
"""[T], any integer type; may be a view of a file that is mapped into memory."""


class Stream(Protocol):
    """One running text."""

    @property
    def name(self) -> str:
        """What it is, for people: "text words.txt"."""

    @property
    def ids(self) -> TokenIds:
        """All of its tokens."""


@runtime_checkable
class Documents(Protocol):
    """Documents in the order of their file."""

    @property
    def name(self) -> str:
        """What they are, for people: "JSON lines words.jsonl"."""

    def __len__(self) -> int:
        """Return the number of documents, empty ones included."""

    def tokens(self, number: int) -> TokenIds:
        """Return the tokens of one document.

        Raises:
            DataError: it cannot be used; names file, line and field.
        """


def ids_of_list(values: list[Any], where: str) -> TokenIds:
    """Return token ids that were found in a list.

    Raises:
        DataError: a value is no whole number, or too large for any vocabulary; ``where`` is told with it.
    """
    wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, int)), None)
    if wrong is not None:
        raise DataError(f"{where} holds {wrong!r} in a list: expected token ids, which are whole numbers.")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        largest = max(values, key=abs)
        raise DataError(f"{where} holds {largest} in a list, which no token id of 64 bits can be.") from error
