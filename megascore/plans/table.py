"""A plan as a table for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from megascore.plans.plan import Plan
from megascore.scores.report import new_table

__all__ = ["render_plan", "size_rows"]

GIB = 2**30


def render_plan(plan: Plan) -> RenderableType:
    """Return sizes before and after, and what a person should know."""
    table = new_table()
    table.add_column("")
    for name in ("before", "after", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by")
    for target, before in plan.sizes_before.items():
        after = plan.sizes_after[target]
        table.add_row(target, f"{before:,}", f"{after:,}", _part(after, before), plan.scores.methods.get(target, ""))
    table.add_section()
    for name, before_text, after_text, left in size_rows(plan):
        table.add_row(name, before_text, after_text, left, "")
    warnings = [Text(f"warning: {text}", style="yellow") for text in plan.warnings]
    return Group(table, *warnings)


def size_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return name, before, after and what is left of each size of the model."""
    before, after = plan.before, plan.after
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("active parameters", before.active_parameters, after.active_parameters),
        ("FLOPs a token", before.flops_per_token, after.flops_per_token),
        ("KV cache bytes a token", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token),
    ]
    texts = [(name, f"{old:,}", f"{new:,}", _part(new, old)) for name, old, new in rows]
    weights = (f"{before.bytes / GIB:.3f}", f"{after.bytes / GIB:.3f}", _part(after.bytes, before.bytes))
    return [*texts, ("GiB of weights", *weights)]


def _part(after: int, before: int) -> str:
    return f"{100 * after / before:.1f} %" if before else ""
