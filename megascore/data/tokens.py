"""Token ids in a ``.npy`` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megascore.data.source import Documents, Stream, TokenIds
from megascore.errors import DataError

__all__ = ["open_token_array"]


class TokenStream:
    """A `Stream`: one row of token ids."""

    def __init__(self, ids: TokenIds, name: str) -> None:
        """Take the ids as they are."""
        self.ids = ids
        self.name = name


class TokenRows:
    """`Documents`: each row is one."""

    def __init__(self, ids: TokenIds, name: str) -> None:
        """Take the ids [documents, tokens] as they are."""
        self._ids = ids
        self.name = name

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ids)

    def tokens(self, number: int) -> TokenIds:
        """Return one row."""
        row: TokenIds = self._ids[number]
        return row


def open_token_array(path: Path) -> Stream | Documents:
    """Map a file into memory: a stream if it holds one dimension, documents if it holds two.

    Raises:
        DataError: the file is no ``.npy`` file, or holds something other than whole numbers in one or two dimensions.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"tokens {path} cannot be read: {error.strerror}. data.tokens names a .npy file.") from error
    except (ValueError, EOFError) as error:
        raise DataError(f"tokens {path} is no .npy file of numbers: {error} Write it with numpy.save.") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"tokens {path} holds several arrays: expected one, as numpy.save writes it.")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise DataError(
            f"tokens {path} holds {array.dtype} {list(array.shape)}: expected whole numbers, [tokens] or "
            "[samples, tokens]."
        )
    name = f"tokens {path}"
    return TokenStream(array, name) if array.ndim == 1 else TokenRows(array, name)
