"""Two score files side by side: how far values, orders and choices differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from megascore.scores.ranking import rankings
from megascore.scores.report import format_percent, new_table, titled
from megascore.scores.score_file import Scores, Unseen

__all__ = [
    "Comparison",
    "SiteComparison",
    "compare",
    "largest_relative_difference",
    "render_comparison",
    "spearman_correlation",
]

_SHOWN_ROWS = 20
_RUN_FACTS = (
    "num_tokens",
    "num_samples",
    "num_steps",
    "loss",
    "weights_fingerprint",
    "data_fingerprint",
    "layout",
    "versions",
)


@dataclass(frozen=True)
class SiteComparison:
    """One vector that both files have at the same length."""

    key: str
    num_compared: int
    """Entries that both files measured."""
    largest_difference: float
    """Largest elementwise relative difference."""
    correlation: float | None
    """Spearman rank correlation; None where it isn't defined."""
    overlap: float | None
    """Part of the lowest fraction that both files name; None for vectors that rank nothing, or where none would go."""


@dataclass(frozen=True)
class Comparison:
    """What differs between score files A and B."""

    sites: tuple[SiteComparison, ...]
    """In the order of file A."""
    mismatches: tuple[str, ...]
    """One line for each key in one file only, or of other length or unseen entries: never within a tolerance."""
    notes: tuple[str, ...]
    """Differences between the runs (model, data, tokens); they explain, and decide nothing."""
    fraction: float
    """Part of each ranking that `SiteComparison.overlap` is about."""

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of all sites; 0 where there is nothing to compare."""
        return max((site.largest_difference for site in self.sites), default=0.0)

    def within(self, tolerance: float) -> bool:
        """Return whether keys, lengths and unseen entries are the same, and no value differs by more than this."""
        return not self.mismatches and self.largest_difference <= tolerance


def compare(a: Scores, b: Scores, fraction: float = 0.25) -> Comparison:
    """Compare every key of two score files, the model-wide vectors too.

    Args:
        a: One file.
        b: The other; the result doesn't depend on which is which, but for the order of the rows.
        fraction: Part of each ranking (0..1) whose overlap is taken.

    Raises:
        ScoreFileError: the scores of one can't be ranked (see `rankings`).
    """
    lowest_a, lowest_b = ({r.key: set(r.lowest(fraction)) for r in rankings(scores)} for scores in (a, b))
    unseen_a, unseen_b = a.unseen, b.unseen
    sites: list[SiteComparison] = []
    mismatches: list[str] = []
    for key in dict.fromkeys([*a, *b, *unseen_a, *unseen_b]):
        mismatch = _mismatch(key, a, b, unseen_a, unseen_b)
        if mismatch:
            mismatches.append(f"{key}: {mismatch}")
        if key in a and key in b and len(a[key]) == len(b[key]):
            overlap = _overlap(lowest_a.get(key), lowest_b.get(key))
            sites.append(_compare_site(key, a[key], b[key], {*unseen_a.get(key, ()), *unseen_b.get(key, ())}, overlap))
    return Comparison(tuple(sites), tuple(mismatches), _notes(a.metadata, b.metadata), fraction)


def largest_relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest ``abs(a - b) / max(abs(a), abs(b))``, where 0 against 0 is no difference; 0 for no entries."""
    scale = torch.maximum(a.abs(), b.abs())
    relative = (a - b).abs() / torch.where(scale > 0, scale, 1.0)
    return float(relative.max()) if len(relative) else 0.0


def spearman_correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the Pearson correlation of the ranks of two vectors [n]; ties get the average of their ranks.

    None, as it isn't defined, for fewer than two entries or where one vector is constant.
    """
    centred_a, centred_b = (ranks - ranks.mean() for ranks in (_average_ranks(a), _average_ranks(b)))
    norms = centred_a.norm() * centred_b.norm()
    if len(a) < 2 or float(norms) == 0:
        return None
    return max(-1.0, min(1.0, float(centred_a @ centred_b / norms)))


def render_comparison(
    comparison: Comparison, *, tolerance: float | None = None, show_all: bool = False
) -> RenderableType:
    """Return the comparison for a rich console, worst sites first.

    Args:
        comparison: What to show.
        tolerance: Mark the sites beyond it, and say the verdict.
        show_all: Show every site instead of the worst 20.
    """
    # Two passes of a stable sort: by difference, and sites equal in that by their correlation.
    ordered = sorted(comparison.sites, key=lambda site: 1.0 if site.correlation is None else site.correlation)
    ordered.sort(key=lambda site: -site.largest_difference)
    shown = ordered if show_all else ordered[:_SHOWN_ROWS]
    parts: list[RenderableType] = [_site_table(shown, comparison.fraction, tolerance)]
    if len(shown) < len(ordered):
        parts.append(Text(f"{len(ordered) - len(shown)} more sites differ less; --all shows them.\n", style="dim"))
    for title, lines in (("not comparable", comparison.mismatches), ("the runs differ", comparison.notes)):
        if lines:
            parts.append(Text(title, style="bold"))
            parts.extend(Text(f"  {line}") for line in lines)
            parts.append(Text(""))
    parts.append(Text(_verdict(comparison, tolerance)))
    return Group(*parts)


def _average_ranks(values: torch.Tensor) -> torch.Tensor:
    _, position, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last_rank = counts.cumsum(0).to(torch.float64)
    average: torch.Tensor = last_rank - (counts - 1) / 2
    return average[position]


def _compare_site(
    key: str, a: torch.Tensor, b: torch.Tensor, unseen: set[int | str], overlap: float | None
) -> SiteComparison:
    both = [index for index in range(len(a)) if index not in unseen]
    a, b = a[both], b[both]
    return SiteComparison(key, len(both), largest_relative_difference(a, b), spearman_correlation(a, b), overlap)


def _overlap(a: set[int] | None, b: set[int] | None) -> float | None:
    if not a or not b:
        return None
    return len(a & b) / max(len(a), len(b))


def _mismatch(
    key: str, a: Scores, b: Scores, unseen_a: Mapping[str, Unseen], unseen_b: Mapping[str, Unseen]
) -> str | None:
    known_a, known_b = (key in a or key in unseen_a), (key in b or key in unseen_b)
    if not known_a or not known_b:
        return f"only in {'A' if known_a else 'B'}"
    if unseen_a.get(key) != unseen_b.get(key):
        return f"unseen in A: {unseen_a.get(key, 'none')}, in B: {unseen_b.get(key, 'none')}"
    if key in a and len(a[key]) != len(b[key]):
        return f"{len(a[key])} scores in A, {len(b[key])} in B"
    return None


def _notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line for each thing about the runs that isn't the same in both."""
    notes = []
    flat_a, flat_b = ({**{n: m.get(n) for n in _RUN_FACTS}, **_prefixed("model", m.get("model", {}))} for m in (a, b))
    for name in dict.fromkeys([*flat_a, *flat_b]):
        if flat_a.get(name) != flat_b.get(name):
            notes.append(f"{name}: {_shown(flat_a.get(name))} in A, {_shown(flat_b.get(name))} in B")
    return tuple(notes)


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={entry}" for name, entry in value.items())
    return "unknown" if value is None else str(value)


def _site_table(sites: list[SiteComparison], fraction: float, tolerance: float | None) -> RenderableType:
    table = new_table()
    table.add_column("site", overflow="fold")
    for name in ("n", "largest difference", "rank correlation", f"overlap {format_percent(fraction)}"):
        table.add_column(name, justify="right")
    for site in sites:
        beyond = tolerance is not None and site.largest_difference > tolerance
        table.add_row(
            site.key.removeprefix("decoder.layers."),
            str(site.num_compared),
            Text(f"{'! ' if beyond else ''}{site.largest_difference:.2g}", style="bold red" if beyond else ""),
            "-" if site.correlation is None else f"{site.correlation:.6f}",
            "-" if site.overlap is None else f"{site.overlap * 100:.1f} %",
        )
    return titled("A against B, worst first", table)


def _verdict(comparison: Comparison, tolerance: float | None) -> str:
    text = f"{len(comparison.sites)} sites compared, largest relative difference {comparison.largest_difference:.3g}"
    if comparison.mismatches:
        text += f", {len(comparison.mismatches)} not comparable"
    if tolerance is not None:
        text += f": {'within' if comparison.within(tolerance) else 'NOT within'} the tolerance of {tolerance:g}"
    return text + "."
