"""Values of a config.json, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascore.errors import ModelError

__all__ = ["ConfigValues", "UnsupportedModelError"]


class UnsupportedModelError(ModelError):
    """A model that is as its makers meant it, but that the loader here does not know."""


@dataclass(frozen=True)
class ConfigValues:
    """Values of a config.json; null counts as missing, as in transformers."""

    path: Path
    raw: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default where it is missing."""
        value = self.raw.get(key)
        return default if value is None else value

    def positive(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1.

        Raises:
            ModelError: it is none.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path}: {key} is {value}: expected a whole number of at least 1.")
        return value

    def refuse_unless(self, key: str, supported: Any, default: Any) -> None:
        """Take one value only.

        Raises:
            UnsupportedModelError: it is another.
        """
        value = self.get(key, default)
        if value != supported:
            raise UnsupportedModelError(f"{self.path}: {key}={value} is not supported; supported: {supported}.")
