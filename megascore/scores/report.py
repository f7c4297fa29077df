"""A score file as tables for people, 80 to 120 columns wide, on a terminal or in a log."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megascore.scores.assemble import MODEL_SITE
from megascore.scores.charts import Bar, Histogram, IndexList, format_ranges
from megascore.scores.ranking import Ranking, rankings
from megascore.scores.score_file import Scores
from megascore.scores.uncertainty import Uncertainty
from megascore.sites.inventory import grouped
from megascore.sites.targets import TARGETS, WholeModel

__all__ = ["format_layout", "format_percent", "new_table", "render_scores", "titled"]

WANTED_OVERLAPS = (0.9, 0.95, 0.98, 0.99)
"""Of which the first that a run does not have is told with the tokens that it takes."""


def render_scores(scores: Scores, fraction: float = 0.25) -> RenderableType:
    """Return what is in a score file for a rich console: the run, a table for each target, what no token reached.

    Args:
        scores: What to show.
        fraction: Part of each ranking (0..1) whose first-to-go entries are named.

    Raises:
        ScoreFileError: the scores can't be ranked (see `rankings`).
        ValueError: `fraction` is outside 0..1.
    """
    by_section: dict[tuple[str, str], list[Ranking]] = {}
    for ranking in rankings(scores):
        by_section.setdefault((ranking.target, ranking.method), []).append(ranking)
    parts: list[RenderableType] = [_header(scores.metadata)]
    for (target, _), section in by_section.items():
        sure = _how_sure({ranking.site: scores.uncertainty.get(ranking.key) for ranking in section})
        if TARGETS[target].whole_model is WholeModel.STACK:
            parts.append(_layer_chart(section[0], fraction, scores.uncertainty.get(section[0].key), sure))
        else:
            parts.append(_site_table(section, fraction, sure))
    if by_section:
        parts.append(_legend())
    if scores.unseen:
        parts.append(_unseen_list(scores))
    not_scored = scores.metadata.get("not_scored")
    if not_scored:
        parts.append(_not_scored_list(not_scored))
    return Group(*parts)


def titled(title: str, table: Table, below: str = "") -> RenderableType:
    """Return a table under its title, which may be wider than the table, and a line below that."""
    return Group(Text(title, style="bold"), *([Text(below, style="dim")] if below else []), table)


def new_table() -> Table:
    """Return an empty table in the style of all reports."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    return table


def format_percent(fraction: float) -> str:
    """Return ``25 %`` for 0.25."""
    return f"{fraction * 100:g} %"


def format_layout(layout: dict[str, Any]) -> str:
    """Return the axes larger than 1, such as ``tensor 3, sequence parallel``.

    >>> format_layout({"tensor": 3, "pipeline": 1, "data": 2, "sequence": True})
    'tensor 3, data 2, sequence parallel'
    """
    parts = [f"{axis} {size}" for axis, size in layout.items() if not isinstance(size, bool) and size != 1]
    parts += ["sequence parallel"] if layout.get("sequence") else []
    return ", ".join(parts) or "one process"


def _header(metadata: dict[str, Any]) -> RenderableType:
    model = metadata.get("model", {})
    sizes = [
        f"{label} {model[name]}"
        for name, label in (
            ("num_layers", "layers"),
            ("hidden_size", "hidden"),
            ("num_attention_heads", "heads"),
            ("num_kv_heads", "KV heads"),
            ("ffn_hidden_size", "FFN"),
        )
        if name in model
    ]
    seen = [f"{metadata[name]:,} {name[4:]}" for name in ("num_tokens", "num_samples", "num_steps") if name in metadata]
    loss = metadata.get("loss")
    rows = {
        "model": str(model.get("name") or model.get("path") or "unnamed"),
        "sizes": ", ".join(sizes),
        "data": ", ".join(seen),
        "loss": "" if loss is None else f"{loss:.4f} nats per token",
        "layout": format_layout(metadata.get("layout", {})),
        "written": f"{metadata['created']} by megascore {metadata['versions'].get('megascore') or '?'}",
    }
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, text in rows.items():
        if text:
            grid.add_row(Text(name, style="dim"), Text(text))
    return Panel(grid, title="megascore", title_align="left", expand=False)


def _how_sure(found: Mapping[str, Uncertainty | None]) -> str:
    """Return a line that says how much of the lowest quarter two such runs would share, by what is known of sites."""
    known = {site: own for site, own in found.items() if own is not None and own.overlap is not None}
    if not known:
        return ""
    worst = min(known, key=lambda site: known[site].overlap or 0.0)
    overlaps = [own.overlap or 0.0 for own in known.values()]
    mean = sum(overlaps) / len(overlaps)
    text = f"two such runs would share {100 * mean:.0f} % of the lowest quarter"
    if len(known) > 1:
        [label] = _site_labels([worst])
        text += f" ({100 * min(overlaps):.0f} % in layer {label})" if label.isdigit() else ""
    whole = next(iter(known.values()))
    wanted = next((target for target in WANTED_OVERLAPS if mean < target), None)
    tokens = None if wanted is None else replace(whole, overlap=mean).tokens_for(wanted)
    return text if tokens is None or wanted is None else f"{text}; {100 * wanted:.0f} % takes about {tokens:,} tokens"


def _site_table(section: Sequence[Ranking], fraction: float, sure: str) -> RenderableType:
    first = section[0]
    table = new_table()
    table.add_column("layer", justify="right", no_wrap=True, overflow="crop")
    for name in ("n", "min", "median", "max", "p90/p10"):
        table.add_column(name, justify="right", no_wrap=True, overflow="crop")
    table.add_column("spread", no_wrap=True, overflow="crop")
    # Only this column gives way when the output is narrow.
    table.add_column(f"first at {format_percent(fraction)}")
    labels = ["all"] if first.site == MODEL_SITE else _site_labels([ranking.site for ranking in section])
    for label, ranking in zip(labels, section, strict=True):
        values = ranking.measured
        low, median, high = (_format_score(float(v)) for v in (values.min(), values.median(), values.max()))
        lowest = ranking.lowest(fraction)
        going = IndexList(lowest) if lowest else Text("none", style="dim")
        table.add_row(label, str(len(values)), low, median, high, _spread(values), Histogram(values), going)
    return titled(f"{_title(first)} by {first.method}{_competition(first, fraction)}", table, sure)


def _competition(ranking: Ranking, fraction: float) -> str:
    if ranking.groups == 1:
        return ""
    count = ranking.count_per_group(fraction)
    text = f", inside each KV group of {ranking.group_size}"
    if count == 0:
        text += f"\n{format_percent(fraction)} of {ranking.group_size} is less than one head, so none goes"
        text += f"; one of each group does from {math.ceil(100 / ranking.group_size)} %"
    return text


def _layer_chart(ranking: Ranking, fraction: float, uncertainty: Uncertainty | None, sure: str) -> RenderableType:
    table = new_table()
    errors = [] if uncertainty is None else uncertainty.standard_error.tolist()
    for name in ("layer", "score", *(["error"] if errors else []), "place"):
        table.add_column(name, justify="right", no_wrap=True, overflow="crop")
    table.add_column(f"at {format_percent(fraction)}", no_wrap=True, overflow="crop")
    table.add_column("")
    order, lowest = ranking.ascending(), set(ranking.lowest(fraction))
    places = {index: place for place, index in enumerate(order, start=1)}
    top = max(float(ranking.measured.max()), 0.0) or 1.0
    for layer, value in enumerate(ranking.values.tolist()):
        error = [_format_score(errors[layer])] if errors else []
        if layer in ranking.unseen:
            table.add_row(str(layer), "-", *(["-"] if errors else []), "-", "unseen", "")
            continue
        mark = Text("goes", style="bold") if layer in lowest else ""
        table.add_row(str(layer), _format_score(value), *error, str(places[layer]), mark, Bar(max(value, 0.0) / top))
    return titled(f"{_title(ranking)} by {ranking.method}, low = can go", table, sure)


def _legend() -> RenderableType:
    return Text(
        "p90/p10: score of the 90th over that of the 10th percentile; 1 = all alike, so a cut can't choose well. "
        "spread: histogram from min to max, logarithmic. n: measured entries. "
        "first: how many would go, least important first. error: standard error of the score, from groups of steps.\n",
        style="dim",
    )


def _unseen_list(scores: Scores) -> RenderableType:
    table = new_table()
    table.add_column("key", overflow="fold")
    table.add_column("entries", overflow="fold")
    for key, entry in scores.unseen.items():
        table.add_row(key, "all" if entry == "all" else format_ranges(entry))
    return titled("not measured, as no token reached it", table)


def _not_scored_list(not_scored: Mapping[str, str]) -> RenderableType:
    table = new_table()
    table.add_column("module", overflow="fold")
    table.add_column("what it is", overflow="fold")
    for line in grouped(f"{name}: {what}" for name, what in not_scored.items()):
        table.add_row(*line.split(": ", 1))
    return titled("not scored, as megascore knows no score of such modules", table)


def _title(ranking: Ranking) -> str:
    return TARGETS[ranking.target].title


def _site_labels(sites: Sequence[str]) -> list[str]:
    """Return layer numbers where they tell the sites apart, and names otherwise."""
    found = [re.match(r"decoder\.layers\.(\d+)\.", site) for site in sites]
    numbers = [match[1] if match else site for site, match in zip(sites, found, strict=True)]
    if len(set(numbers)) == len(sites):
        return numbers
    return [site.removeprefix("decoder.layers.") for site in sites]


def _spread(values: torch.Tensor) -> str:
    if len(values) < 2:
        return "-"
    low, high = torch.quantile(values, torch.tensor([0.1, 0.9], dtype=values.dtype)).tolist()
    if low <= 0:
        return "1" if high == low else "inf"
    ratio = high / low
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.2g}"


def _format_score(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"
