"""A run that was stopped in one layout goes on in another, and gives the scores of an undisturbed run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megascore.resume.folder import RunFolder
from tests.job.resumable import (
    NUM_STEPS,
    Job,
    assert_same_scores,
    copy_of,
    make_job,
    run_and_stop_on_rank,
    run_on_rank,
)
from tests.pool import WorkerPool

STOPPED_AFTER = 3
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order, divided by small scores."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP 2": (2, ("parallel.tensor=2",)),
    "TP 4 and SP": (4, ("parallel.tensor=4", "parallel.sequence=true")),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "virtual PP": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "CP 2": (2, ("parallel.context=2",)),
    "DP 2, other micro-batches": (2, ("run.micro_batch_size=2",)),
}


@pytest.fixture(scope="module")
def stopped(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    """A run at TP=2 with sequence parallelism and DP=2, stopped half-way."""
    job = make_job(tmp_path_factory.mktemp("stopped") / "run", model_root)
    degrees = ("parallel.tensor=2", "parallel.sequence=true")
    told = world.run(4, run_and_stop_on_rank, job, STOPPED_AFTER - 1, degrees, signal.SIGUSR1, 3)
    assert all("Preempted: stopped by SIGUSR1 after step 3" in text for text in told)
    return job


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_run_goes_on_in_another_layout(
    layout: str, stopped: Job, undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = copy_of(stopped, tmp_path / "run", model_root)
    world_size, overrides = LAYOUTS[layout]
    shown = world.run(world_size, run_on_rank, job, overrides)
    assert f"going on from {job.checkpoints}" in shown[0]
    assert f"step {STOPPED_AFTER}" in shown[0]
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_one_process_goes_on_where_any_layout_was_stopped(
    undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    for name in ("TP 4 and SP", "virtual PP", "DP 2, other micro-batches", "CP 2"):
        job = make_job(tmp_path / name, model_root)
        world_size, overrides = LAYOUTS[name]
        assert "Preempted" in world.run(world_size, run_and_stop_on_rank, job, 1, overrides)[0]
        world.run(1, run_on_rank, job)
        assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_a_run_goes_on_from_every_boundary(
    undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    """Stopped after each step in turn, every time in the other of two layouts."""
    job = make_job(tmp_path / "run", model_root)
    for step in range(NUM_STEPS - 1):
        world_size, overrides = LAYOUTS["TP 2" if step % 2 else "PP 2"]
        told = world.run(world_size, run_and_stop_on_rank, job, step, overrides)
        assert f"Preempted: stopped by SIGTERM after step {step + 1}" in told[0]
    world.run(1, run_on_rank, job)
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_a_run_stopped_at_its_last_step_finishes(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    job = make_job(tmp_path / "run", model_root)
    told = world.run(2, run_and_stop_on_rank, job, NUM_STEPS - 1)
    assert "Preempted" not in told[0]
    assert job.output.exists()


def test_another_global_batch_is_refused_with_the_reason(
    stopped: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = copy_of(stopped, tmp_path / "run", model_root)
    told = world.run(2, run_on_rank, job, ("run.global_batch_size=8", "run.steps=3"))
    assert "CheckpointError" in told[0]
    assert "run.global_batch_size is 4 there, 8 here" in told[0]
    assert "RankFailure" in told[1]
    assert not job.output.exists()


def test_saving_on_request_goes_on(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    job = make_job(tmp_path / "run", model_root)
    by_request = ("run.checkpoint_interval=null",)
    told = world.run(2, run_and_stop_on_rank, job, 2, by_request, signal.SIGUSR2, 1)
    assert "checkpoint of step 3" in told[0]
    # One because of the signal, and one at the end.
    assert told[0].count("checkpoint of step") == 2
    assert job.output.exists()
    folder = RunFolder(job.checkpoints)
    names = [path.name for path in folder.checkpoints()]
    assert names == ["megascore-step-00000003.safetensors", "megascore-step-00000006.safetensors"]
    folder.close()
