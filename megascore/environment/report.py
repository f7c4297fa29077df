"""The tables of ``megascore env``."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megascore.environment.look import Environment

__all__ = ["render_environment"]


def render_environment(environment: Environment) -> RenderableType:
    """Return what was found for a rich console: versions and packages, GPUs, and optional paths, on or off."""
    found = _table("found", "version", "")
    for name, version in environment.versions.items():
        found.add_row(name, _text(version or "none"), "")
    for package in environment.packages:
        found.add_row(package.name, _text(package.version or "not installed"), _text(package.problem or ""))
    for number, device in enumerate(environment.devices):
        found.add_row(f"GPU {number}", _text(device.name), f"{device.memory_bytes / 2**30:.1f} GiB")
    if not environment.devices:
        found.add_row("GPU", "none", "")
    paths = _table("path", "", "")
    for path in environment.paths:
        paths.add_row(path.name, "on" if path.is_on else "off", _text(path.why))
    notes = [Text(f"torch warns: {note}") for note in environment.notes]
    return Group(found, *notes, Text(), paths)


def _table(*titles: str) -> Table:
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:2]:
        column.overflow = "fold"
    return table


def _text(plain: str) -> Text:
    # As it is: an error's text may hold what looks like markup.
    return Text(plain)
