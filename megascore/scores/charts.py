"""Small text charts for rich tables; plain ASCII where the output can't show block characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

__all__ = ["Bar", "Histogram", "IndexList", "format_ranges"]

_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = " .:-=+*%@"


@dataclass(frozen=True)
class Histogram:
    """How values spread between their smallest and largest: one character for each bin, taller = more entries."""

    values: torch.Tensor
    num_bins: int = 8

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one line; an empty bin is a blank."""
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        counts = self.bin_counts()
        top = max(counts)
        yield Text(
            "".join(blocks[-(-count * (len(blocks) - 1) // top)] for count in counts), no_wrap=True, overflow="crop"
        )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take one column for each bin."""
        return Measurement(self.num_bins, self.num_bins)

    def bin_counts(self) -> list[int]:
        """Return the entries in each bin; bins are even in the logarithm where all values are positive."""
        axis = self.values.log() if bool((self.values > 0).all()) else self.values
        low, span = axis.min(), axis.max() - axis.min()
        position = (axis - low) / span if float(span) > 0 else torch.zeros_like(axis)
        bins = (position * self.num_bins).long().clamp(0, self.num_bins - 1)
        counts: list[int] = torch.bincount(bins, minlength=self.num_bins).tolist()
        return counts


@dataclass(frozen=True)
class Bar:
    """A bar whose length is ``fraction`` (0..1) of the column."""

    fraction: float
    max_width: int = 40

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one line, at least one mark long unless the fraction is zero."""
        width = min(self.max_width, options.max_width)
        length = max(round(self.fraction * width), 1 if self.fraction > 0 else 0)
        yield Text(("#" if options.ascii_only else "\u2588") * length, no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take what there is, up to the widest bar."""
        return Measurement(8, min(self.max_width, options.max_width))


@dataclass(frozen=True)
class IndexList:
    """A count and as many of the first indices as fit into the column."""

    indices: Sequence[int]
    max_shown: int = 12

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one line; ``..`` says that there are more."""
        yield Text(self.fitted(options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take one index at least, all that may be shown at most."""
        return Measurement(len(self.fitted(0)), len(self.fitted(1000)))

    def fitted(self, width: int) -> str:
        """Return the longest form that is at most `width` wide; one index is always shown."""
        for shown in range(min(len(self.indices), self.max_shown), 0, -1):
            more = " .." if shown < len(self.indices) else ""
            text = f"{len(self.indices)}: {' '.join(str(index) for index in self.indices[:shown])}{more}"
            if len(text) <= width or shown == 1:
                return text
        return "0"


def format_ranges(indices: Sequence[int]) -> str:
    """Return sorted indices with runs shortened: ``0-3, 7``.

    >>> format_ranges([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("-".join(str(end) for end in run) for run in runs)
