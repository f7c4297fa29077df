"""Whole jobs on a vocabulary that tensor parallelism does not divide: the scores and the loss of one process.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from megascore.config import DataConfig, JobConfig, ModelConfig, ParallelConfig, RunConfig
from megascore.job.dry_run import dry_run
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import parallel_world
from tests.job.plans import plan_of
from tests.job.resumable import Job, assert_same_scores, run_on_rank
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

VOCABULARY = 129
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order, divided by small scores."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP 2": (2, ("parallel.tensor=2",)),
    "TP 2 and SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "TP 2, PP 2 x VPP 2": (
        4,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
}


def save_padded(directory: Path, folder: Path) -> None:
    """Save a model as Megatron does on two ranks, where its embedding has a row that is no token's."""
    parallel, cpu = ParallelConfig(tensor=2), torch.device("cpu")
    with parallel_world(parallel, cpu, timedelta(minutes=1)):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float64"), parallel, cpu, 16)
        save_torch_dist(chunks, folder, args=training_args(directory, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Path:
    """Return a folder with the same model as ``hf`` and ``megatron``, and ``ids.npy``."""
    root = tmp_path_factory.mktemp("padded")
    save_checkpoint(root / "hf", "qwen2", vocab_size=VOCABULARY)
    world.run(2, save_padded, root / "hf", root / "megatron")
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (7, 16))
    # The last token is where the padding begins.
    ids[:, 4] = VOCABULARY - 1
    np.save(root / "ids.npy", ids)
    return root


def make(folder: Path, model: dict[str, str], ids: Path) -> Job:
    folder.mkdir()
    job = Job(folder)
    sections = {
        "model": {**model, "dtype": "float64"},
        "data": {"tokens": str(ids), "sequence_length": 16},
        "scores": [{"target": target} for target in ("ffn", "attention_heads", "hidden_size", "layers")],
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": 4},
    }
    job.config.write_text(json.dumps(sections))
    return job


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make(tmp_path_factory.mktemp("alone") / "run", {"hf": str(root / "hf")}, root / "ids.npy")
    shown = world.run(1, run_on_rank, job)
    assert job.output.exists(), shown
    return job


@pytest.mark.parametrize("blockwise", ["false", "true"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_loss_are_those_of_one_process(
    layout: str, blockwise: str, root: Path, alone: Job, tmp_path: Path, world: WorkerPool
) -> None:
    world_size, degrees = LAYOUTS[layout]
    for key, folder in (("hf", "hf"), ("load", "megatron")):
        job = make(tmp_path / folder, {key: str(root / folder)}, root / "ids.npy")
        shown = world.run(world_size, run_on_rank, job, (f"run.blockwise={blockwise}", *degrees))
        assert job.output.exists(), shown
        found, expected = job.scores(), alone.scores()
        assert_same_scores(found, expected, TOLERANCE)
        # Of the loss, which is no small number, only the order of sums is left.
        assert found.metadata["loss"] == pytest.approx(expected.metadata["loss"], rel=1e-12)


@pytest.mark.parametrize(("key", "folder"), [("hf", "hf"), ("load", "megatron")])
def test_a_number_of_the_padding_is_no_token(
    key: str, folder: str, root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    np.save(tmp_path / "ids.npy", np.full((4, 16), VOCABULARY))
    job = make(tmp_path / "run", {key: str(root / folder)}, tmp_path / "ids.npy")
    for told in world.run(2, run_on_rank, job, ("parallel.tensor=2",)):
        assert f"ids.npy gives token {VOCABULARY}, but the model {folder} has {VOCABULARY} tokens" in told
    assert not job.output.exists()


def test_a_dry_run_counts_the_padding(root: Path) -> None:
    planned = dry_run(
        JobConfig(
            model=ModelConfig(hf=str(root / "hf"), dtype="float32"),
            data=DataConfig(tokens=str(root / "ids.npy"), sequence_length=16),
            parallel=ParallelConfig(tensor=2),
            run=RunConfig(steps=0, device="cpu", global_batch_size=4),
        )
    )
    assert planned is not None
    hidden, ffn = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv_rows = 2 * SIZES["num_key_value_heads"] * hidden // SIZES["num_attention_heads"]
    # Queries, keys and values have biases, as in every qwen2.
    qkv, proj = (hidden + kv_rows) * (hidden + 1), hidden * hidden
    layer = 2 * hidden + (qkv + proj + 3 * hidden * ffn) // 2
    numbers = SIZES["num_hidden_layers"] * layer + hidden + 65 * hidden
    for rank in (0, 1):
        assert plan_of(planned, rank).weight_bytes == {"float32": 4 * numbers}
