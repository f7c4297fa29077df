"""Whether scores are as sure as a run says: its standard errors and overlaps beside those between many disjoint texts.

    python -m tests.benchmarks.spread [--texts 20] [--samples 16] [--length 255] [--model FOLDER]

The shipped novel is cut into texts of as many tokens each, of whose beginnings samples are taken, which are scored one
text after the other with ``low_loss``, in eight steps. For each target: the standard error that a run tells (the root
of the mean square over runs and units of a vector, its median over vectors) over the standard deviation between runs,
and the overlap that a run expects beside that which two runs have. Without ``--model`` it is SmolLM2-135M.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import megascore
from launch import smollm2
from tests.benchmarks.quality import TEXT, load

NUM_STEPS = 8


class Vector(NamedTuple):
    """What the runs say of one vector."""

    told_over_true: float
    """Standard error that runs tell, over the standard deviation between them."""
    expected_overlap: float
    overlap: float


def texts_of(folder: Path, number: int, num_samples: int, length: int) -> list[Tensor]:
    """Return disjoint texts, [samples, length] each, from as many places of the novel."""
    from transformers import AutoTokenizer

    novel = (TEXT / "northanger_abbey.txt").read_text()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(novel, verbose=False)["input_ids"])
    of_text = len(tokens) // number
    used = num_samples * length
    if used > of_text:
        raise SystemExit(
            f"{number} texts have {of_text} tokens each, fewer than {num_samples} x {length}: ask for less"
        )
    return list(tokens[: number * of_text].view(number, of_text)[:, :used].view(number, num_samples, length))


def score(model: nn.Module, text: Tensor) -> megascore.Scores:
    with megascore.attach(model, recipe="low_loss") as run, torch.no_grad():
        for step in text.chunk(NUM_STEPS):
            model(input_ids=step)
            run.step()
    return run.finish()


def compare(key: str, runs: Sequence[megascore.Scores], num_competing: int) -> Vector:
    """Compare what runs say of a vector with how they differ."""
    values = torch.stack([run[key] for run in runs])
    errors = torch.stack([run.uncertainty[key].standard_error for run in runs])
    told, true = errors.square().mean().sqrt(), values.var(0).mean().sqrt()
    expected = [run.uncertainty[key].overlap for run in runs]
    lowest = [_lowest(row, num_competing) for row in values]
    shared = [len(one & other) / len(one) for one, other in combinations(lowest, 2)]
    return Vector(float(told / true), mean(part for part in expected if part is not None), mean(shared))


def _lowest(values: Tensor, num_competing: int) -> set[int]:
    """Return the lowest quarter of each group of units that compete, one unit at least."""
    groups = values.view(num_competing, -1)
    number = max(1, round(0.25 * groups.shape[1]))
    order = groups.argsort(dim=1)[:, :number] + torch.arange(num_competing)[:, None] * groups.shape[1]
    return set(order.flatten().tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="samples of each text")
    parser.add_argument("--length", type=int, default=255, help="tokens of each sample")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    folder = options.model or smollm2.convert_once(smollm2.default_folder())
    model, texts = load(folder), texts_of(folder, options.texts, options.samples, options.length)
    runs = [score(model, text) for text in texts]
    found = defaultdict(list)
    for key, own in runs[0].uncertainty.items():
        if own.overlap is not None:
            groups = runs[0].metadata["model"]["num_kv_heads"] if "/attention_heads/" in key else 1
            found[key.split("/", 1)[1]].append(compare(key, runs, groups))
    table = Table("score", "vectors", "told / true error", "smallest", "largest", "expected overlap", "overlap")
    for name, vectors in found.items():
        ratios = [vector.told_over_true for vector in vectors]
        numbers = (median(ratios), min(ratios), max(ratios))
        overlaps = (mean(v.expected_overlap for v in vectors), mean(v.overlap for v in vectors))
        table.add_row(name, str(len(vectors)), *(f"{x:.2f}" for x in numbers), *(f"{100 * x:.0f} %" for x in overlaps))
    console = Console(width=110)
    console.print(f"{len(texts)} texts of {texts[0].numel()} tokens")
    console.print(table)


if __name__ == "__main__":
    main()
