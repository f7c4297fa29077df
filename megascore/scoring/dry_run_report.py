"""A dry run as text: a table of sites, then what each rank keeps and sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console

from megascore.scoring.dry_run import DryRun, RankGroup

__all__ = ["format_bytes", "render_dry_run"]

HEADINGS = ("site / target / method", "channels here", "roles", "ranks", "memory here", "sent here")
SCRATCH_BYTES = 1 << 26
"""What a call of any hook takes at most; tests/hooks/test_kernels.py measures it."""
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
LEGEND = (
    "Roles: shard = channels split; sum = samples split; sum* = sequences split; same = replicated; own = other layers",
    "or experts live there. Channels, memory and what a step sends for one sample are those of one rank.",
)


def render_dry_run(dry_run: DryRun, console: Console) -> None:
    """Show what a run would measure, keep and send."""
    sites = dry_run.sites
    layout = ", ".join(f"{name}={value}" for name, value in dry_run.layout.items())
    title = f"{len({line.key for line in sites})} sites on {dry_run.num_ranks} ranks; layout {layout}"
    rows = [
        (
            line.key,
            f"{line.num_local_channels} of {line.num_channels}",
            line.roles,
            _spans(ranks),
            format_bytes(line.kept_bytes),
            format_bytes(line.sample_bytes),
        )
        for line, ranks in sites.items()
    ]
    notes = (*_without_hook(dry_run), *LEGEND, "", *_ranks(dry_run), *_world(dry_run))
    # In one go, and not as a table of rich's: there may be 100,000 sites, and names are worth more than the width.
    text = "\n".join((title, "", *_aligned([HEADINGS, *rows]), "", *notes))
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows, the first of which is the headings, with their cells below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rights = ["here" in heading for heading in rows[0]]
    for row in rows:
        cells = zip(row, widths, rights, strict=True)
        yield "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()


def format_bytes(num_bytes: int) -> str:
    """Return a size for people, in powers of 1000; ``-`` for nothing."""
    if not num_bytes:
        return "-"
    size, unit = float(num_bytes), 0
    # What rounds to 1000.0 is one of the next unit.
    while size >= 999.95 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{num_bytes} B"


def _without_hook(dry_run: DryRun) -> list[str]:
    """Say what could be pruned, but no score of the run is taken there."""
    names: dict[str, set[str]] = defaultdict(set)
    for group in dry_run.groups:
        for name, kind in group.plan.unscored.items():
            names[kind].add(name)
    unknown = {name for group in dry_run.groups for name in group.plan.unknown}
    known = [f"No hook: {len(where)} x {kind}: not in 'scores'" for kind, where in sorted(names.items())]
    return known + [f"No hook: {name}: not a module that megascore knows" for name in sorted(unknown)]


def _ranks(dry_run: DryRun) -> Iterator[str]:
    """Yield one line for each group of ranks that have the same sums."""
    alike: dict[str, list[int]] = defaultdict(list)
    for group in dry_run.groups:
        alike[_sums(group, dry_run.samples_of_step)].extend(group.ranks)
    for text, ranks in alike.items():
        yield f"Ranks {_spans(sorted(ranks))}: {text}"


def _sums(group: RankGroup, num_samples: int) -> str:
    plan = group.plan
    weights = " + ".join(f"{format_bytes(size)} {dtype}" for dtype, size in sorted(plan.weight_bytes.items()))
    kept, step = f"hooks keep {format_bytes(plan.kept_bytes)}", "a step sends nothing"
    if plan.waiting_bytes:
        kept += f", and {format_bytes(plan.waiting_bytes)} more until a step ends"
    if plan.step_bytes:
        of_samples = f"{num_samples} samples, {format_bytes(plan.sample_bytes)} for one"
        step = f"a step sends {format_bytes(plan.step_bytes)} ({of_samples})"
    return f"{len(plan.sites)} sites; weights {weights or 'none'}; {kept}; {step}."


def _world(dry_run: DryRun) -> Iterator[str]:
    weights, kept = (
        sum(len(group.ranks) * number for group, number in zip(dry_run.groups, numbers, strict=True))
        for numbers in (
            [sum(group.plan.weight_bytes.values()) for group in dry_run.groups],
            [group.plan.kept_bytes for group in dry_run.groups],
        )
    )
    yield f"All {dry_run.num_ranks} ranks: weights {format_bytes(weights)}, hooks {format_bytes(kept)}."
    yield f"The end of the run sends {format_bytes(dry_run.finish_bytes)} from each rank, in two all-reduces, once."
    yield f"Activations of the model come on top, and up to {format_bytes(SCRATCH_BYTES)} while a hook runs."
    yield "A dry run reads no data and no weights, and writes no file."
    if dry_run.pretended:
        yield f"The {dry_run.num_ranks} processes were pretended by this one, and the model was built without memory."
    for problem in dry_run.problems:
        yield f"Not ready: {problem}"


def _spans(ranks: Sequence[int]) -> str:
    """Return numbers as spans: 0-2,5."""
    runs = [[rank for _, rank in group] for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
