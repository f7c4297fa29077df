"""Cases that every supported Megatron-Core scores the same; run by `test_versions` with another version on the path.

python -m tests.versions.cases INPUTS OUTPUT

INPUTS is a folder that `jobs.write_inputs` has filled, OUTPUT one for scores and for a folder of each job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from tests.mcore.expert_model import SIZES, Variant, build_expert_model
from tests.pool import WorkerPool
from tests.versions.jobs import run_jobs

__all__ = ["SCORES", "score_cases"]

SCORES = "scores.safetensors"
"""What `score_cases` gave, in OUTPUT."""

NUM_STEPS = 2
DENSE = [
    {"target": "ffn"},
    {"target": "ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
    {"target": "attention_heads"},
    {"target": "kv_heads"},
    {"target": "hidden_size"},
    {"target": "layers"},
]
EXPERTS = [{"target": "experts"}, {"target": "expert_ffn"}, {"target": "shared_expert_ffn"}]
LAYOUTS: dict[str, tuple[dict[str, Any], Variant | None]] = {
    "TP=2 SP": ({"tensor": 2, "sequence": True}, None),
    "PP=2, 2 chunks": ({"pipeline": 2, "virtual_pipeline": 2}, None),
    "CP=2": ({"context": 2}, None),
    "TP=2 SP, EP=2, experts": ({"tensor": 2, "sequence": True, "expert": 2}, Variant("alltoall")),
    "EP=2, grouped experts": ({"expert": 2}, Variant("alltoall", "te_grouped")),
}
"""On two processes; without a variant it is the Hugging Face checkpoint."""


def score_cases(checkpoint: str) -> tuple[str, dict[str, Tensor]]:
    """Return the version of Megatron-Core, and all scores by layout and key; collective over two ranks."""
    # First of all: it imports Megatron as a machine without GPU and triton can.
    import_module("megascore.mcore")
    from megatron.core import __version__

    scores = {f"{layout}: {key}": value for layout in LAYOUTS for key, value in _score(layout, checkpoint)}
    return __version__, scores


def _score(layout: str, checkpoint: str) -> Iterator[tuple[str, Tensor]]:
    from megatron.core import parallel_state

    import megascore
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    degrees, variant = LAYOUTS[layout]
    parallel, cpu = ParallelConfig(**degrees), torch.device("cpu")
    length = SIZES["sequence"]
    with parallel_world(parallel, cpu, timedelta(seconds=60)):
        if variant is None:
            chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), parallel, cpu, length)
        else:
            chunks = build_expert_model(parallel, variant)
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        with megascore.attach(chunks, scores=DENSE if variant is None else EXPERTS) as run:
            for step in range(NUM_STEPS):
                tokens = torch.randint(0, SIZES["vocab"], (2, length), generator=generator)
                # The last tokens do not count.
                masks = list((torch.arange(length) < length - 3 * step).expand(2, length).split(1)) if step else None
                forward_only(chunks, list(tokens.split(1)), True, masks, run)
                run.step()
        yield from run.finish().items()


def _write_cases(checkpoint: str, output: Path) -> None:
    """Written by a rank, for Megatron 0.18 and later change how a tensor is pickled, for readers that have it."""
    version, scores = score_cases(checkpoint)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in scores.items()}, output, {"version": version})


def _main() -> None:
    inputs, output = map(Path, sys.argv[1:])
    pool = WorkerPool()
    try:
        pool.run(2, _write_cases, str(inputs / "qwen3"), output / SCORES, timeout=240)
        run_jobs(pool, inputs, output)
    finally:
        pool.close()


if __name__ == "__main__":
    _main()
