"""Numbers as a person reads and edits them: ``0-5, 7, 9-12``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megascore.errors import PlanError

__all__ = ["parse_ranges", "ranges_text"]

MOST = 10_000_000
"""Units of one vector are some ten thousand; a longer range is a slip, and would fill the memory."""


def ranges_text(numbers: Sequence[int]) -> str:
    """Return whole numbers as ranges, in their own order.

    >>> ranges_text([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def parse_ranges(text: object, where: str) -> tuple[int, ...]:
    """Return the numbers of a text of ranges, or of a single number.

    >>> parse_ranges("0-2, 5", "plan.yaml: layers")
    (0, 1, 2, 5)

    Raises:
        PlanError: it is none.
    """
    if type(text) is int and text >= 0:
        return (text,)
    if not isinstance(text, str):
        raise PlanError(f"{where} is {text!r}: expected ranges of numbers counted from 0, such as '0-5, 7, 9-12'.")
    numbers: list[int] = []
    for part in text.split(",") if text.strip() else []:
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if match is None:
            raise PlanError(f"{where} has {part.strip()!r}: expected ranges such as '0-5, 7, 9-12'.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > MOST:
            raise PlanError(f"{where} has {part.strip()!r}: expected a range from a smaller to a larger number.")
        numbers.extend(range(first, last + 1))
    return tuple(numbers)
