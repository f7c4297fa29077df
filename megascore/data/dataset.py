"""A folder that Hugging Face's ``Dataset.save_to_disk`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megascore.data.encoder import Encoder
from megascore.data.source import TokenIds
from megascore.errors import ConfigError, DataError

__all__ = ["DatasetFolder"]


class DatasetFolder:
    """`Documents` in one column, of texts or of lists of token ids; the folder's tables are mapped into memory."""

    def __init__(self, path: Path, field: str, encoder: Encoder) -> None:
        """Open the folder.

        Raises:
            ConfigError: the package datasets is not installed.
            DataError: the folder is none of a dataset, holds several splits, or has no such column.
        """
        self.name = f"dataset {path}"
        self._field = field
        self._encoder = encoder
        table = _open(path)
        if field not in table.column_names:
            raise DataError(
                f"{self.name}: column '{field}' missing; found: {', '.join(table.column_names) or 'none'}. "
                "data.field names the one with the documents."
            )
        self._table = table.with_format(None).select_columns([field])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def tokens(self, number: int) -> TokenIds:
        """Return the tokens of one row.

        Raises:
            DataError: the value is neither a text nor a list of token ids.
        """
        value = self._table[number][self._field]
        return self._encoder.document(value, f"{self.name} row {number}: column '{self._field}'")


def _open(path: Path) -> Any:
    if not path.is_dir():
        raise DataError(f"dataset {path} not found: data.dataset names a folder that save_to_disk wrote.")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.dataset needs the package datasets ({error}): run pip install 'megascore[data]'."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # Whatever Arrow and JSON raise for damaged files.
        raise DataError(f"dataset {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"dataset {path} holds the splits {', '.join(map(str, loaded))}: name the folder of one, such as "
            f"data.dataset={path / str(next(iter(loaded), 'train'))}."
        )
    return loaded
