"""Values of a config.json, checked as they are read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from megascore.errors import ModelError

__all__ = ["ConfigValues", "UnsupportedModelError"]

LARGEST = 2**63 - 1
"""Megatron and torch take sizes of 64 bits."""


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

    def positive(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """Return a whole number from 1 to ``most``.

        Raises:
            ModelError: it is none.
        """
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "a whole number of at least 1")
        if value > most:
            raise self.wrong(key, value, f"a whole number of at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a finite number above 0.

        Raises:
            ModelError: it is none.
        """
        value = self.get(key, default)
        # A whole number too long for a float is compared, not converted.
        if type(value) not in (int, float) or not 0 < value <= LARGEST or not isfinite(value):
            raise self.wrong(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false.

        Raises:
            ModelError: it is something else, such as the text "false".
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text.

        Raises:
            ModelError: it is none.
        """
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def mapping(self, key: str) -> ConfigValues:
        """Return what is under a key, none where it is missing.

        Raises:
            ModelError: it is no mapping.
        """
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "a mapping")
        return ConfigValues(self.path, value)

    def layer_numbers(self, key: str) -> list[int]:
        """Return numbers of layers, counted from 0; none where the key is missing.

        Raises:
            ModelError: it is no list of them.
        """
        value = self.get(key, [])
        if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
            raise self.wrong(key, value, "a list of layers, counted from 0")
        return value

    def texts(self, key: str) -> list[str] | None:
        """Return a list of texts; None where it is missing.

        Raises:
            ModelError: it is none.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, value, "a list of texts")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> ModelError:
        """Return the error for a value that is not as expected; a long one is told in part."""
        return ModelError(f"{self.path}: {key} is {reprlib.repr(value)}: expected {expected}.")

    def refuse_unless(self, key: str, supported: Any, default: Any) -> None:
        """Take one value only.

        Raises:
            UnsupportedModelError: it is another.
        """
        value = self.get(key, default)
        if value != supported:
            shown = value if isinstance(value, str) else reprlib.repr(value)
            raise UnsupportedModelError(f"{self.path}: {key}={shown} is not supported; supported: {supported}.")
