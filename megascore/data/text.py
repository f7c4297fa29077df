"""A plain text file: one running text."""

from __future__ import annotations

from pathlib import Path

from megascore.data.encoder import Encoder
from megascore.data.source import TokenIds
from megascore.errors import DataError

__all__ = ["TextFile"]


class TextFile:
    """A `Stream`: tokenized as a whole, so that no token is cut where a piece would have ended."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        """Read and tokenize the file.

        Raises:
            DataError: it is missing or not UTF-8.
            ModelError: the tokenizer cannot be loaded.
        """
        self.name = f"text {path}"
        self.ids: TokenIds = encoder.running_text(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"text {path} cannot be read: {error.strerror}. data.text names a UTF-8 file.") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text {path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} ({error.reason}). "
            f"Convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
