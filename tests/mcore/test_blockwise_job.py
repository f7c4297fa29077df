"""Whole jobs that run one layer at a time: the scores and the loss of a full pass, on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mcore.resumable import Job, assert_same_scores, make_job, run_on_rank
from tests.mcore.test_job import save_tokenizer
from tests.models import save_checkpoint
from tests.pool import WorkerPool

BLOCKWISE = "run.blockwise=true"
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order, divided by small scores."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP 2 and SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "CP 2": (2, ("parallel.context=2",)),
    "DP 2, other micro-batches": (2, ("run.micro_batch_size=2",)),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "PP 2, uneven": (2, ("parallel.pipeline=2", "parallel.pipeline_layers=[3,1]")),
    "PP 2 x VPP 2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "TP 2 x PP 2": (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2")),
}


@pytest.fixture(scope="module")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def full_pass(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make_job(tmp_path_factory.mktemp("full") / "run", model_root)
    world.run(1, run_on_rank, job)
    assert job.output.exists()
    return job


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_by_layer_gives_the_scores_of_a_full_pass(
    layout: str, full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    world_size, overrides = LAYOUTS[layout]
    shown = world.run(world_size, run_on_rank, job, (BLOCKWISE, *overrides))
    assert job.output.exists(), shown
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer has no experts, which the others have."""
    folder = save_checkpoint(tmp_path_factory.mktemp("experts") / "qwen3_moe", "qwen3_moe")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lengths = (20, 3, 16, 1, 9, 12, 2, 5)
    texts = [" ".join(f"w{(7 * i * i + i + length) % 100}" for i in range(length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def expert_job(folder: Path, model: Path, documents: Path) -> Job:
    folder.mkdir()
    job = Job(folder)
    scores = ["experts", "expert_ffn", "ffn", "layers", "hidden_size", "attention_heads"]
    sections = {
        "model": {"hf": str(model), "dtype": "float64"},
        "data": {"jsonl": str(documents), "packing": False, "sequence_length": 16},
        "scores": [{"target": target} for target in scores],
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": 4},
    }
    job.config.write_text(json.dumps(sections))
    return job


def test_experts_and_padded_documents_come_out_as_in_a_full_pass(
    experts: Path, documents: Path, tmp_path: Path, world: WorkerPool
) -> None:
    full = expert_job(tmp_path / "full", experts, documents)
    world.run(1, run_on_rank, full)
    for name, world_size, overrides in (
        ("one", 1, ()),
        ("EP 2", 2, ("parallel.expert=2",)),
        ("TP 2, EP 2, VPP 2", 4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2",
                               "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    ):  # fmt: skip
        job = expert_job(tmp_path / name, experts, documents)
        shown = world.run(world_size, run_on_rank, job, (BLOCKWISE, *overrides))
        assert job.output.exists(), (name, shown)
        assert_same_scores(job.scores(), full.scores(), TOLERANCE)
        assert job.scores().unseen == full.scores().unseen
