"""Two checkouts compared: score files bit for bit, texts, exit codes, and checkpoints that one of them made.

    python -m tests.benchmarks.two_checkouts OLD [NEW] [--keep FOLDER] [--only TEXT]

OLD and NEW are roots of checkouts; NEW is this one if not given. Each runs the jobs of `cases` with its own package, on
the same tiny models and texts. With ``--keep`` inputs and results of OLD stay in a folder, and later runs with it only
run NEW. ``report.txt`` in that folder has every difference; a table is printed.

Exit code 1: tensors of a score file differ or are missing, or NEW misreads what OLD saved. Metadata, texts and codes
that differ are for people to judge.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.two_checkouts.cases import CROSSED, Case, named, score
from tests.benchmarks.two_checkouts.compare import Differences, compare
from tests.benchmarks.two_checkouts.inputs import write_inputs
from tests.benchmarks.two_checkouts.runner import CODES, Checkout

HERE = Path(__file__).parents[3]
MADE_BY = "made_by.txt"
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors")
CROSSED_PREFIX = "old's files, "
GOING_ON = "going on from"


@dataclass(frozen=True)
class Row:
    """A case in the table."""

    name: str
    verdict: str
    differences: Differences
    fails: bool


def main() -> int:
    """Run, compare, report; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", metavar="OLD", type=Path, help="root of a checkout")
    parser.add_argument("new", metavar="NEW", type=Path, nargs="?", default=HERE, help="the same (default: this one)")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="where results of OLD stay for the next run")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their names, on both sides")
    options = parser.parse_args()
    checkouts = [options.old.resolve(), options.new.resolve()]
    with results_folder(options.keep) as folder:
        wanted = named(options.only)
        run_old(checkouts[0], wanted, folder, partly=bool(options.only))
        run_new(checkouts[1], wanted, folder)
        rows = [row_of(case, folder, checkouts) for case in wanted]
        rows += [crossed_row_of(case, folder, checkouts) for case in crossed(wanted)]
        report(rows, folder, checkouts)
    return int(any(row.fails for row in rows))


@contextmanager
def results_folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another comparison is running in {kept}: wait for it, or copy the folder")
        yield kept.resolve()


def run_old(checkout: Path, cases: Sequence[Case], folder: Path, *, partly: bool) -> None:
    """Write the inputs and run the old checkout, unless just that is there already."""
    made_by = f"{description(checkout)}\n{tool_fingerprint()}\n"
    note = folder / MADE_BY
    if note.exists() and note.read_text() == made_by:
        return say(f"old: results of an earlier run, {made_by.splitlines()[0]}")
    for name in ("inputs", "old", "new"):
        shutil.rmtree(folder / name, ignore_errors=True)
    note.unlink(missing_ok=True)
    write_inputs(folder / "inputs")
    with Checkout(checkout, folder / "old.log") as side:
        # A Megatron checkpoint is an input, and only inside of a job are there groups in which Megatron can save one.
        side.run(Case("saving", (score("saving"),)), folder / "old" / "saving", folder)
        assert (folder / "inputs" / "torch_dist").exists(), (folder / "old/saving/score.rank0.txt").read_text()
        run_all(side, cases, folder / "old", "old")
    if not partly:
        note.write_text(made_by)
    return None


def run_new(checkout: Path, cases: Sequence[Case], folder: Path) -> None:
    shutil.rmtree(folder / "new", ignore_errors=True)
    with Checkout(checkout, folder / "new.log") as side:
        run_all(side, cases, folder / "new", "new")
        for case in crossed(cases):
            side.run(case, folder / "new" / f"{CROSSED_PREFIX}{case.name}", folder / "old")


def run_all(side: Checkout, cases: Sequence[Case], folder: Path, name: str) -> None:
    started = time.monotonic()
    for case in cases:
        say(f"{name} {time.monotonic() - started:4.0f} s  {case.name}")
        side.run(case, folder / case.name, folder)


def crossed(cases: Sequence[Case]) -> list[Case]:
    """Cases that the new checkout runs on files of the old one, too."""
    names = {case.name for case in cases}
    return [case for case in CROSSED if case.name in names]


def row_of(case: Case, folder: Path, checkouts: Sequence[Path]) -> Row:
    found = compare(folder / "old" / case.name, folder / "new" / case.name, checkouts)
    if found.scores:
        verdict = "DIFFERS"
    elif found.num_tensors:
        verdict = "equal"
    else:
        # Two failures that look alike prove nothing.
        verdict = "NONE THERE" if case.has_scores else "-"
    return Row(case.name, verdict, found, fails=verdict in ("DIFFERS", "NONE THERE"))


def crossed_row_of(case: Case, folder: Path, checkouts: Sequence[Path]) -> Row:
    """Whether the new checkout has read the old one's files and given the same, or has refused them by name."""
    own, other = folder / "new" / f"{CROSSED_PREFIX}{case.name}", folder / "old" / case.name
    found = compare(other, own, checkouts)
    name = case.starts[0].name
    said, said_by_old = (text_of(path, name) for path in (own, other))
    codes = json.loads((own / CODES).read_text())[name]
    # 2: an error that explains itself; 3: that of another rank.
    refused = 2 in codes and set(codes) <= {2, 3} and not list(own.glob("*.safetensors"))
    if refused:
        verdict = "refused"
    elif found.scores:
        # What goes on from the old files as from its own has read them; then its scores themselves are others.
        as_own = not compare(folder / "new" / case.name, own, checkouts).scores
        verdict = "read, as its own" if as_own else "MISREAD"
    else:
        verdict = "read, equal" if GOING_ON in said or GOING_ON not in said_by_old else "equal, begun afresh"
    lines = [line for line in said.splitlines() if refused and line][:1]
    return Row(
        f"{CROSSED_PREFIX}{case.name}", verdict, replace(found, texts=[*lines, *found.texts]), verdict == "MISREAD"
    )


def text_of(folder: Path, start: str) -> str:
    """Return what the ranks of a start have said, rank after rank."""
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{start}.rank*.txt")))


def report(rows: Sequence[Row], folder: Path, checkouts: Sequence[Path]) -> None:
    """Print a table and write every difference."""
    table = Table("case", "scores", "tensors", "metadata", "exit codes", "texts", box=None)
    lines = [f"old: {description(checkouts[0])}", f"new: {description(checkouts[1])}"]
    for row in rows:
        found = row.differences
        kinds = (found.metadata, found.codes, found.texts)
        table.add_row(row.name, row.verdict, str(found.num_tensors), *("differ" if kind else "equal" for kind in kinds))
        for title, kind in zip(("scores", "metadata", "exit codes", "texts"), (found.scores, *kinds), strict=True):
            if kind:
                lines += [f"\n== {row.name}: {title}", *kind]
    text = "\n".join(lines)
    (folder / "report.txt").write_text(text + "\n")
    print(text if len(lines) < 200 else f"{len(lines)} lines of differences: {folder / 'report.txt'}")
    Console(width=160).print(table)


def description(checkout: Path) -> str:
    """Return a checkout's path and commit, and whether files of its package are others."""
    commit, changed = (
        subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "megascore"])
    )
    return f"{checkout}, {commit[:12]}{', with changes' if changed else ''}"


def tool_fingerprint() -> str:
    """Return what tells results of other jobs, or in another environment, from those of these."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([here / "cases.py", here / "inputs.py", *(here / "side").glob("*.py")]):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:16]} {' '.join(metadata.version(name) for name in PACKAGES)} {sys.version_info[:3]}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
