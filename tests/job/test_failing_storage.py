"""Storage that fails: all ranks end with the same error, in time, and the last good checkpoint stands."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megascore.resume import folder as checkpoint_folder
from megascore.resume.progress_file import RunState, read_status
from megascore.runs.steps import Cursor
from tests.job.resumable import Job, assert_same_scores, make_job, run_on_rank
from tests.pool import WorkerPool

FAILING_STEP = 4


@contextmanager
def broken_write(instead: Callable[[Path], None]) -> Iterator[None]:
    """Let something happen when the checkpoint of `FAILING_STEP` is written, in place of the write's own beginning."""
    whole = checkpoint_folder.write_whole

    def breaking(path: Path, content: bytes, **options: Any) -> None:
        if f"{FAILING_STEP:08d}" in path.name:
            instead(path)
        whole(path, content, **options)

    checkpoint_folder.write_whole = breaking
    try:
        yield
    finally:
        checkpoint_folder.write_whole = whole


def no_space(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_only(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def vanished(path: Path) -> None:
    path.parent.rename(path.parent.with_name("vanished"))


def silent(path: Path) -> None:
    # Never answers, as far as this test goes: that the run ends at all is what is tested.
    threading.Event().wait(600)


FAILURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no space": (no_space, "No space left on device"),
    "read-only": (read_only, "Read-only file system"),
    "vanished": (vanished, "No such file or directory"),
    "silent": (silent, "the storage did not answer within"),
}


def run_with(failure: str, job: Job, overrides: list[str]) -> str:
    with broken_write(FAILURES[failure][0]):
        return run_on_rank(job, overrides)


@pytest.mark.parametrize("failure", FAILURES)
def test_all_ranks_end_with_one_error_and_the_last_good_checkpoint_stands(
    failure: str, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    # 6 s for the other ranks, half of it for the storage.
    results = world.run(2, run_with, failure, job, ["run.timeout_minutes=0.1", "parallel.tensor=2"])
    for told in results:
        assert FAILURES[failure][1] in told
        assert f"checkpoint of step {FAILING_STEP}" in told
        assert f"failed in {job.checkpoints} (run.checkpoint_dir), on rank 0" in told
        assert "the last good checkpoint is" in told
        assert "megascore-step-00000003.safetensors" in told
    assert ["CheckpointError" in told for told in results] == [True, False]
    assert not job.output.exists()
    if failure == "vanished":
        assert not job.checkpoints.exists()
        (job.folder / "vanished").rename(job.checkpoints)
    elif failure != "silent":
        assert read_status(job.checkpoints)["state"] == RunState.FAILED.value
    # The same command goes on when the storage is mended.
    told = world.run(2, run_on_rank, job, ["parallel.tensor=2"])[0]
    assert f"megascore-step-{FAILING_STEP - 1:08d}.safetensors, step {FAILING_STEP - 1}" in told
    undisturbed = make_job(tmp_path / "undisturbed", model_root)
    world.run(2, run_on_rank, undisturbed, ["parallel.tensor=2"])
    assert_same_scores(job.scores(), undisturbed.scores(), 1e-14)


def run_without_progress_file(job: Job) -> str:
    """Make the progress file's place a folder after the first steps: writing it then fails, on rank 0 alone."""
    import torch.distributed as dist

    def block(cursor: Cursor) -> None:
        target = job.checkpoints / "progress.json"
        if cursor.step == 3 and dist.get_rank() == 0:
            target.unlink()
            (target / "inside").mkdir(parents=True)

    return run_on_rank(job, ["parallel.pipeline=2"], block)


def test_a_progress_file_that_can_not_be_written_stops_all_ranks(
    model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    told = world.run(2, run_without_progress_file, job)
    assert all("on rank 0: Is a directory" in text for text in told)
    shutil.rmtree(job.checkpoints / "progress.json")
    assert "going on from" in world.run(2, run_on_rank, job)[0]


def test_an_unusable_folder_is_refused_before_the_model_is_loaded(
    model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    (tmp_path / "file").write_text("")
    told = world.run(2, run_on_rank, job, [f"run.checkpoint_dir={tmp_path / 'file' / 'inside'}"])
    assert "CheckpointError: checkpoint folder" in told[0]
    assert "opening the checkpoint folder failed on rank 0" in told[1]
