"""The cost of a checkpoint of a large model: ``python -m tests.benchmarks.checkpoints [FOLDER]``.

The states are those that the hooks declare for the real shapes of the models; they are merged as one rank does it,
encoded, and written to FOLDER (a temporary one by default) with all syncing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megascore.config import RunConfig
from megascore.hooks import (
    ForwardHook,
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    IterativeChannelContributionHook,
    L2NormHook,
    LayerNormContributionHook,
)
from megascore.hooks.block_similarity import BlockSimilarityHook
from megascore.parallel.axes import Placement
from megascore.parallel.merge import Part, merge_over_world
from megascore.resume.folder import RunFolder
from megascore.resume.snapshot import Snapshot

REPEATS = 5


@dataclass(frozen=True)
class Shape:
    name: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_kv_heads: int


SHAPES = (
    Shape("Llama-3-8B", 32, 4096, 14336, 8),
    Shape("Llama-3-70B", 80, 8192, 28672, 8),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 8),
)


def main() -> None:
    """Measure and print one row for each model and list of scores."""
    interval = RunConfig().checkpoint_seconds
    table = Table(title=f"checkpoints, medians of {REPEATS}; share of a run at one in {interval:g} s")
    for column in ("model", "scores", "MB", "merge s", "encode and write s", "share"):
        table.add_column(column, justify="left" if column in ("model", "scores") else "right")
    for shape in SHAPES:
        for scores, parts in (("minitron", minitron(shape)), ("every method", every_method(shape))):
            size, merge, write = measure(dict(parts))
            share = (merge + write) / (interval or 1)
            table.add_row(
                shape.name, scores, f"{size / 1e6:,.1f}", f"{merge:.2f}", f"{write:.2f}", f"{100 * share:.2f} %"
            )
    Console().print(table)


def minitron(shape: Shape) -> Iterator[tuple[str, Part]]:
    """Yield the states of the default recipe."""
    yield "decoder.final_layernorm/hidden_size/l2_norm", part(L2NormHook(), shape.hidden_size)
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}"
        yield f"{name}.mlp.linear_fc2/ffn/l2_norm", part(L2NormHook(), shape.ffn_size)
        yield f"{name}.self_attention.linear_proj/attention_heads/l2_norm", part(L2NormHook(), shape.hidden_size)
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            yield f"{name}.{norm}/hidden_size/l2_norm", part(L2NormHook(), shape.hidden_size)
        yield f"{name}/layers/block_similarity", part(BlockSimilarityHook(), 1)


def every_method(shape: Shape) -> Iterator[tuple[str, Part]]:
    """Yield the states of every method of every target of a dense model."""
    yield from minitron(shape)
    wide, small = torch.nn.Linear(shape.ffn_size, 1, bias=False), torch.nn.Linear(shape.hidden_size, 1, bias=False)
    layer_norm = torch.nn.LayerNorm(shape.hidden_size)
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}"
        iterative = IterativeChannelContributionHook(wide, {"validation_full_iters": 64})
        heads = IndependentKvHeadContributionHook.for_heads(small, shape.num_kv_heads)
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            yield (
                f"{name}.{norm}/hidden_size/layer_norm",
                part(LayerNormContributionHook(layer_norm), shape.hidden_size),
            )
        yield f"{name}/ffn/independent", part(IndependentChannelContributionHook(wide), shape.ffn_size)
        yield f"{name}/ffn/iterative", part(iterative, shape.ffn_size)
        yield f"{name}/kv_heads/independent", part(heads, shape.num_kv_heads)


def part(hook: ForwardHook, num_channels: int) -> Part:
    """Return a hook's state for so many channels."""
    hook.allocate(num_channels, "cpu")
    return Part(Placement.whole(num_channels), hook.statistics(num_channels), hook.state)


def measure(parts: Mapping[str, Part]) -> tuple[int, float, float]:
    """Return bytes, seconds to merge, and seconds to encode and write."""
    plan = {key: own.statistics for key, own in parts.items()}
    merging, writing, size = [], [], 0
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        with RunFolder(Path(name)) as folder:
            for step in range(REPEATS):
                started = time.perf_counter()
                states = merge_over_world(plan, parts, torch.device("cpu"))
                merged = time.perf_counter()
                _, size = folder.write(Snapshot({"step": step + 1}, {}, states))
                merging.append(merged - started)
                writing.append(time.perf_counter() - merged)
    return size, statistics.median(merging), statistics.median(writing)


if __name__ == "__main__":
    main()
