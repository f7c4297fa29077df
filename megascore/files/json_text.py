"""JSON that others wrote."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none (``json.JSONDecodeError``, ``UnicodeDecodeError``), holds a number with more digits than
            Python reads, or is nested deeper than Python's stack: one kind of error for whoever names the file.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
