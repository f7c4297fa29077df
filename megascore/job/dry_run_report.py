"""A dry run as text: a table of sites, then what each rank keeps and sends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console

from megascore.hooks import TaylorHook
from megascore.hooks.registry import methods_of
from megascore.job.planned import DryRun, OneLayer, RankPlan
from megascore.scores.charts import format_ranges
from megascore.scores.score_file import split_key
from megascore.sites.inventory import grouped

__all__ = ["format_bytes", "render_dry_run"]

SITE_HEADINGS = ("site / target / method", "channels here", "roles", "ranks", "memory here", "sent here")
RANK_HEADINGS = ("ranks", "sites", "weights", "hooks keep", "more in a step", "a step sends", "for one sample")
LEFT = ("site / target / method", "roles", "ranks", "weights")
"""Headings of columns that are words; the others are numbers, and stand on the right."""
CPU_SCRATCH_BYTES, GPU_SCRATCH_BYTES = 1 << 26, 1 << 29
"""What the arithmetic of a call takes at most, whatever the hook; tests/hooks and tests/gpu measure it."""
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
    notes = (*_without_hook(dry_run), *LEGEND, "", *_ranks(dry_run), "", *_world(dry_run))
    # In one go, and not as a table of rich's: there may be 100,000 sites, and names are worth more than the width.
    text = "\n".join((title, "", *_aligned([SITE_HEADINGS, *rows]), "", *notes))
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows, the first of which is the headings, with their cells below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lefts = [heading in LEFT for heading in rows[0]]
    for row in rows:
        cells = zip(row, widths, lefts, strict=True)
        yield "  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells).rstrip()


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
    unknown = grouped(name for group in dry_run.groups for name in group.plan.unknown)
    known = [f"No hook: {len(where)} x {kind}: not in 'scores'" for kind, where in sorted(names.items())]
    return known + [f"No hook: {name}: not a module that megascore knows" for name in unknown]


def _ranks(dry_run: DryRun) -> Iterator[str]:
    """Yield a table with a row for each group of ranks that have the same sums, and one for all."""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for group in dry_run.groups:
        alike[_sums(group.plan)].extend(group.ranks)
    rows = [(_spans(sorted(ranks)), *sums) for sums, ranks in alike.items()]
    weights = sum(len(group.ranks) * sum(group.plan.weight_bytes.values()) for group in dry_run.groups)
    kept = sum(len(group.ranks) * group.plan.kept_bytes for group in dry_run.groups)
    number = str(len({line.key for line in dry_run.sites}))
    together = ("together", number, format_bytes(weights), format_bytes(kept), "", "", "")
    yield from _aligned([RANK_HEADINGS, *rows, together])


def _sums(plan: RankPlan) -> tuple[str, ...]:
    weights = " + ".join(f"{format_bytes(size)} {dtype}" for dtype, size in sorted(plan.weight_bytes.items()))
    sizes = (plan.kept_bytes, plan.waiting_bytes, plan.step_bytes, plan.sample_bytes)
    return str(len(plan.sites)), weights or "-", *map(format_bytes, sizes)


def _world(dry_run: DryRun) -> Iterator[str]:
    yield f"A step is {dry_run.samples_of_step} samples on a rank."
    yield f"The end of the run sends {format_bytes(dry_run.finish_bytes)} from each rank, in two all-reduces, once."
    yield from _one_layer(dry_run)
    yield from _further_passes(dry_run)
    cpu, gpu = format_bytes(CPU_SCRATCH_BYTES), format_bytes(GPU_SCRATCH_BYTES)
    yield "Activations of the model come on top, and what a hook has while it runs: what other ranks send it, and"
    yield f"up to {cpu} on a CPU, {gpu} on a GPU."
    yield "A dry run reads no data and no weights, and writes no file."
    if dry_run.pretended:
        yield f"The {dry_run.num_ranks} ranks were pretended by one process, which built the model without memory."
    for problem in dry_run.problems:
        yield f"Not ready: {problem}"


def _one_layer(dry_run: DryRun) -> Iterator[str]:
    """Yield a line for each group of ranks that need the same where layers run one at a time."""
    ranks: dict[OneLayer, list[int]] = defaultdict(list)
    for group in dry_run.groups:
        if group.plan.one_layer is not None:
            ranks[group.plan.one_layer].extend(group.ranks)
    for memory, numbers in ranks.items():
        hidden = format_bytes(memory.hidden_bytes_of_sample * (memory.num_samples or 1))
        each = " for each sample of the rank" if memory.num_samples is None else ""
        where = "run.spool_dir, beyond run.spool_memory_gb" if memory.spools else "host memory"
        weights = format_bytes(memory.weight_bytes)
        yield (
            f"One layer at a time: {weights} of weights, and the hooks of one layer; {hidden} of hidden states{each} "
            f"wait in {where} (ranks {_spans(sorted(numbers))})."
        )
    for reason in sorted({memory.whole_because for memory in ranks if memory.whole_because is not None}):
        yield f"The whole model is built on the device first: {reason}. Then its layers wait in host memory."


def _further_passes(dry_run: DryRun) -> Iterator[str]:
    """Say what the scores cost that no module sees."""
    layers: dict[str, set[str]] = defaultdict(set)
    goes_back = False
    for line in dry_run.sites:
        site, target, method = split_key(line.key)
        # Several methods of one hook have a name together, and none of them is of this kind.
        own = methods_of(target).get(method)
        if own is not None and issubclass(own.hook, TaylorHook):
            goes_back = True
        elif own is not None and own.hook.needs_job:
            layers[method].add(site)
    if goes_back:
        yield (
            "For taylor each step takes a further forward pass and a backward one, of one micro-batch after the other. "
            "The activations of a micro-batch, as in training without gradients of weights, come on top of the memory."
        )
    if not layers:
        return
    number = max(map(len, layers.values()))
    passes = 1 if set(layers) == {"span_similarity"} else (number + 1) / 2
    yield (
        f"For {', '.join(layers)} each step takes about {passes:g} further forward passes. The hidden states of one "
        "micro-batch before each layer of the rank stay in memory meanwhile."
    )


def _spans(ranks: Sequence[int]) -> str:
    """Return sorted numbers as spans without spaces: 0-2,5."""
    return format_ranges(ranks).replace(" ", "")
