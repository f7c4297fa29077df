"""Whole jobs that run one layer at a time: the scores and the loss of a full pass, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mcore.resumable import Job, assert_same_scores, make_job, run_on_rank
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
