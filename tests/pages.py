"""Pages of the project (README.md and the like), taken apart: blocks of code, inline code, links, headings, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "blocks", "code_spans", "headings", "links", "name_of", "prose", "rows"]

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (".github", "docker", "launch", "megascore", "tests")
PAGES = [ROOT / "README.md", *(page for room in ROOMS for page in sorted((ROOT / room).rglob("*.md")))]

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, as the comment before it says; None where it is."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(name_of(page), line, found["language"], found["text"], found["reason"])


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return _BLOCK.sub("", page.read_text())


def code_spans(page: Path) -> Iterator[str]:
    """Yield inline code; a line break in it counts as a space."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        yield re.sub(r"\s+", " ", span)


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of all tables below a heading, without the lines that separate their heads."""
    section = re.split(rf"^#+ {re.escape(heading)}\n", page.read_text(), flags=re.M)[1]
    lines = [line for line in re.split(r"^#+ ", section, flags=re.M)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-")]
