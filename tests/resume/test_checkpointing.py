"""Times at which a run saves, by steps and by a clock of the test's own; storage that refuses or hangs. One process."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megascore.errors import CheckpointError, ConfigError
from megascore.files.whole import write_whole
from megascore.hooks.statistics import State
from megascore.process.signals import Signals
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.plan import SAVE_SHARE, CheckpointPlan
from megascore.resume.progress_file import RunState, read_status

NUM_STEPS = 10


class Clock:
    """A clock that goes where the test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run whose states take some time to be merged."""

    def __init__(self, clock: Clock, merge_seconds: float = 0.0) -> None:
        self.clock, self.merge_seconds = clock, merge_seconds

    def merged_states(self) -> Mapping[str, State]:
        self.clock.now += self.merge_seconds
        return {"a": {"sums": torch.ones(2)}}


def saved_steps(
    plan: CheckpointPlan,
    *,
    step_seconds: float = 1.0,
    merge_seconds: float = 0.0,
    signals: Signals | None = None,
    asked_at: int | None = None,
    write: Callable[..., None] = write_whole,
) -> list[int]:
    """Run all steps; return those after which a checkpoint was written."""
    clock, saved = Clock(), []
    signals = signals or Signals()

    def noting(path: Path, content: bytes, **options: Any) -> None:
        write(path, content, **options)
        if path.suffix == ".safetensors":
            saved.append(int(path.stem.removeprefix("megascore-step-")))

    run, console = Run(clock, merge_seconds), Console(file=io.StringIO())
    with Checkpointer(plan, console, signals, write=noting, clock=clock) as checkpoints:
        checkpoints.begin(NUM_STEPS, checkpoints.find({}), {})
        for step in range(NUM_STEPS + 1):
            signals.save = step == asked_at
            checkpoints.between_steps(run, {"step": step}, is_last=step == NUM_STEPS)
            clock.now += step_seconds
    return saved


def test_a_run_saves_by_steps_and_at_its_end(tmp_path: Path) -> None:
    assert saved_steps(CheckpointPlan(tmp_path, interval=4, seconds=None)) == [4, 8, 10]


def test_a_run_saves_by_the_clock(tmp_path: Path) -> None:
    assert saved_steps(CheckpointPlan(tmp_path, seconds=30.0), step_seconds=10.0) == [3, 6, 9, 10]


def test_a_run_that_saves_slowly_saves_more_rarely(tmp_path: Path) -> None:
    # The first takes 1 s, so the next comes after SAVE_SHARE seconds, and not after 10.
    plan = CheckpointPlan(tmp_path, seconds=10.0)
    assert saved_steps(plan, step_seconds=SAVE_SHARE / 4, merge_seconds=1.0) == [1, 5, 9, 10]


def test_a_run_saves_when_it_is_asked_to(tmp_path: Path) -> None:
    assert saved_steps(CheckpointPlan(tmp_path, seconds=None), asked_at=3) == [3, 10]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"interval": 0}, "the interval between checkpoints is 0: expected at least 1 step"),
        ({"seconds": 0.0}, "the time between checkpoints is 0.0 s: expected a positive number"),
        ({"storage_seconds": -1.0}, "the time for the storage is -1.0 s"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        CheckpointPlan(tmp_path, **options)


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def silent(path: Path) -> None:
    # Never answers, as far as this test goes: that the run ends at all is what is tested.
    threading.Event().wait(600)


@pytest.mark.parametrize(
    ("failure", "told"), [(full, "No space left on device"), (silent, "the storage did not answer within 5 s")]
)
def test_storage_that_fails_ends_the_run_and_names_the_last_good_checkpoint(
    failure: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    def write(path: Path, content: bytes, **options: Any) -> None:
        if path.stem.endswith("8"):
            failure(path)
        write_whole(path, content, **options)

    with pytest.raises(CheckpointError) as caught:
        saved_steps(CheckpointPlan(tmp_path, interval=4, seconds=None, storage_seconds=5.0), write=write)
    text = f"writing the checkpoint of step 8 failed in {tmp_path} (run.checkpoint_dir), on rank 0: {told}; the last"
    assert text in str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'megascore-step-00000004.safetensors'}" in str(caught.value)
    assert read_status(tmp_path)["state"] == RunState.FAILED.value
    assert read_status(tmp_path)["error"] == str(caught.value)
