"""What a run would measure, before any data is read: every site with its channels, its roles and its ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megascore.parallel.axes import describe
from megascore.parallel.comm import gather_objects, world_rank
from megascore.scoring.places import KIND_OF_TARGET
from megascore.scoring.run import ScoringRun
from megascore.scoring.sites import Site

__all__ = ["SiteLine", "list_sites", "list_without_hook", "render_sites"]

TABLE_WIDTH = 140
FLOAT64_BYTES = 8
LEGEND = (
    "Roles: shard = channels split; sum = samples split; sum* = sequences split; same = replicated; own = other layers",
    "live there. Channels, state (memory) and sent (by a step, for one sample) are those of one rank.",
    "A dry run reads no weights and writes no file.",
)


@dataclass(frozen=True, order=True)
class SiteLine:
    """One site as one rank sees it."""

    key: str
    kind: str
    num_channels: int
    roles: str
    num_local_channels: int
    state_bytes: int
    step_bytes: int
    """Sent by a step, for one sample on a rank."""


def list_sites(sites: Sequence[Site]) -> dict[SiteLine, list[int]]:
    """Return all sites of the world with the ranks that have them. Collective over the world."""
    ranks: dict[SiteLine, list[int]] = defaultdict(list)
    for rank, lines in enumerate(gather_objects([_line(site) for site in sites])):
        for line in lines:
            ranks[line].append(rank)
    return dict(ranks)


def render_sites(run: ScoringRun, console: Console) -> None:
    """Show on rank 0 what a run would measure. Collective over the world."""
    lines = list_sites(run.sites)
    without_hook = list_without_hook(run)
    if world_rank() != 0:
        return
    layout = ", ".join(f"{name}={value}" for name, value in run.view.layout.items())
    table = Table(title=f"{len({line.key for line in lines})} sites; layout {layout}", title_justify="left", box=SIMPLE)
    for heading in ("site / target / method", "channels here", "roles", "ranks", "state here", "sent here"):
        table.add_column(heading, no_wrap=True, justify="right" if "here" in heading else "left")
    for line, ranks in lines.items():
        sizes = _kibibytes(line.state_bytes), _kibibytes(line.step_bytes)
        channels = f"{line.num_local_channels} of {line.num_channels}"
        table.add_row(line.key, channels, line.roles, _spans(ranks), *sizes)
    # Names are worth more than the width of the window.
    Console(file=console.file, width=max(console.width, TABLE_WIDTH)).print(table)
    for text in without_hook:
        console.print(f"No hook: {text}", highlight=False, soft_wrap=True)
    for text in (*LEGEND, *_totals(lines)):
        console.print(text, highlight=False, soft_wrap=True)


def _totals(lines: Mapping[SiteLine, Sequence[int]]) -> list[str]:
    """Return one line for each group of ranks that have the same sums."""
    by_rank: dict[int, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    for line, ranks in lines.items():
        for rank in ranks:
            sites, state, step = by_rank[rank]
            by_rank[rank] = (sites + 1, state + line.state_bytes, step + line.step_bytes)
    ranks_of: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for rank in sorted(by_rank):
        ranks_of[by_rank[rank]].append(rank)
    return [
        f"Ranks {_spans(ranks)}: {sites} sites, {_kibibytes(state)} of state, a step sends {_kibibytes(step)} a sample."
        for (sites, state, step), ranks in ranks_of.items()
    ]


def list_without_hook(run: ScoringRun) -> list[str]:
    """Return what could be pruned, but no score of this run is taken there. Collective over the world."""
    scored = {KIND_OF_TARGET[request.target] for request in run.requests}
    own = {place.name: place.kind.value for place in run.view.places if place.kind not in scored}
    names: dict[str, set[str]] = defaultdict(set)
    unknown: set[str] = set()
    for places, found in gather_objects((own, list(run.view.unknown))):
        unknown.update(found)
        for name, kind in places.items():
            names[kind].add(name)
    known = [f"{len(where)} x {kind}: not in 'scores'" for kind, where in sorted(names.items())]
    return known + [f"{name}: not a module that megascore knows" for name in sorted(unknown)]


def _line(site: Site) -> SiteLine:
    shard = site.place.placement.shard
    state_bytes = sum(tensor.nbytes for tensor in site.hook.state.values())
    step_bytes = site.hook.pending_numbers(1) * FLOAT64_BYTES
    kind, roles = site.place.kind.value, describe(site.place.placement)
    return SiteLine(site.key, kind, shard.total, roles, shard.length, state_bytes, step_bytes)


def _kibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.1f} KiB" if num_bytes else "-"


def _spans(ranks: Sequence[int]) -> str:
    """Return numbers as spans: 0-2,5."""
    runs = [[rank for _, rank in group] for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
