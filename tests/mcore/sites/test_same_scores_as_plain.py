"""The same weights get the same scores in transformers and in Megatron-Core, experts and shared widths included.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import megascore
from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.parallel_world import parallel_world
from tests.mcore.logits import CPU, TIMEOUT
from tests.models import save_checkpoint
from tests.pool import WorkerPool
from tests.smaller import exact

LENGTH = 16
LAYOUTS = {"one process": (1, ParallelConfig()), "expert": (2, ParallelConfig(expert=2))}


def wanted(family: str) -> list[dict[str, str]]:
    targets = ["attention_heads", "kv_heads", "hidden_size", "layers", "experts", "expert_ffn"]
    return [{"target": target} for target in [*targets, *(["ffn"] if family == "qwen3_moe" else [])]]


def in_megatron(folder: Path, family: str, parallel: ParallelConfig, tokens: Tensor) -> megascore.Scores:
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(folder), dtype="float64"), parallel, CPU, LENGTH)
        rank = torch.distributed.get_rank()
        # Expert parallelism takes data-parallel ranks: each has its part of the samples.
        own = tokens.chunk(torch.distributed.get_world_size())[rank]
        with megascore.attach(chunks, scores=wanted(family)) as run:
            forward_only(chunks, [own], compute_loss=False)
            run.step()
        return run.finish()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_score_the_same_in_both_libraries(family: str, layout: str, tmp_path: Path, world: WorkerPool) -> None:
    folder = save_checkpoint(tmp_path / "model", family)
    tokens = torch.randint(0, 128, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    model = exact(folder)
    with megascore.attach(model, scores=wanted(family)) as run:
        model(tokens)
        run.step()
    plain = run.finish()
    world_size, parallel = LAYOUTS[layout]
    megatron = world.run(world_size, in_megatron, folder, family, parallel, tokens)[0]
    assert list(plain) == list(megatron)
    assert plain.unseen == megatron.unseen
    for key in plain:
        # Both take rotary angles and the router's softmax in float32, each in its own way.
        torch.testing.assert_close(plain[key], megatron[key], rtol=1e-5, atol=1e-9, msg=key)
