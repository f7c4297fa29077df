"""What a run would measure, before any data is read: every site with its channels, its roles and its ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megascore.parallel.axes import describe
from megascore.parallel.comm import gather_objects, world_rank
from megascore.scoring.run import ScoringRun
from megascore.scoring.sites import Site

__all__ = ["SiteLine", "list_sites", "render_sites"]

TABLE_WIDTH = 140


@dataclass(frozen=True, order=True)
class SiteLine:
    """One site as one rank sees it."""

    key: str
    kind: str
    num_channels: int
    roles: str
    num_local_channels: int
    state_bytes: int


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
    if world_rank() != 0:
        return
    layout = ", ".join(f"{name}={value}" for name, value in run.view.layout.items())
    table = Table(title=f"{len({line.key for line in lines})} sites; layout {layout}", title_justify="left", box=SIMPLE)
    for heading in ("site / target / method", "channels here", "roles", "ranks", "state here"):
        table.add_column(heading, no_wrap=True, justify="right" if "here" in heading else "left")
    for line, ranks in lines.items():
        channels = f"{line.num_local_channels} of {line.num_channels}"
        table.add_row(line.key, channels, line.roles, _spans(ranks), f"{line.state_bytes / 1024:.1f} KiB")
    # Names are worth more than the width of the window.
    Console(file=console.file, width=max(console.width, TABLE_WIDTH)).print(table)
    console.print("Roles: shard = channels split; sum = samples split; sum* = sequences split; same = replicated;")
    console.print("own = other layers live there. A dry run reads no weights and writes no file.")


def _line(site: Site) -> SiteLine:
    shard = site.place.placement.shard
    state_bytes = sum(tensor.nbytes for tensor in site.hook.state.values())
    kind, roles = site.place.kind.value, describe(site.place.placement)
    return SiteLine(site.key, kind, shard.total, roles, shard.length, state_bytes)


def _spans(ranks: Sequence[int]) -> str:
    """Return numbers as spans: 0-2,5."""
    runs = [[rank for _, rank in group] for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
