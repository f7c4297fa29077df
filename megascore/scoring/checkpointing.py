"""When a run saves, goes on and stops: decided at the ends of steps, by all ranks together.

Rank 0 alone reads and writes the folder; what it finds or fails with is told to all. A checkpoint is the merged state
of all ranks, taken between two steps, so that a step counts in it as a whole or not at all.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from torch import Tensor

from megascore.errors import CheckpointError, MegascoreError, Preempted, RankFailure
from megascore.parallel.comm import agree, max_over_world, share, world_rank
from megascore.scoring.checkpoint_folder import CheckpointFolder, Found
from megascore.scoring.deadline import within
from megascore.scoring.run import ScoringRun
from megascore.scoring.signals import Signals
from megascore.scoring.snapshot import Snapshot, differences
from megascore.scoring.status import PROGRESS_NAME, RunState, StatusFile, read_status

__all__ = ["CheckpointPlan", "Checkpointer"]

SAVE_SHARE = 100
"""A checkpoint that the clock asks for comes after at least this many times what the last one took: 1 % of a run."""


@dataclass(frozen=True)
class CheckpointPlan:
    """Where and when to save."""

    folder: Path
    interval: int | None = None
    """Steps between checkpoints."""
    seconds: float | None = 300.0
    """Time between checkpoints, by rank 0's clock."""
    afresh: bool = False
    """Drop the checkpoints that are there."""
    write_seconds: float = 300.0
    """How long the storage may take; less than ranks wait for each other."""


class Checkpointer:
    """Checkpoints of one run; ``with Checkpointer(plan, console) as checkpoints``. Its methods are collective.

    While its ``with`` block runs, SIGTERM and SIGUSR1 to any rank make all ranks save at the end of the step and raise
    `Preempted`, and SIGUSR2 makes them save and go on.
    """

    def __init__(self, plan: CheckpointPlan, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; the folder is opened by ``with``.

        Args:
            plan: The same on all ranks.
            console: Where rank 0 says what it saved.
            clock: Seconds, for tests.
        """
        self._plan = plan
        self._console = console
        self._clock = clock
        self._signals = Signals()
        self._folder: CheckpointFolder | None = None
        self._status: StatusFile | None = None
        self._status_error: OSError | None = None
        self._identity: Mapping[str, Any] = {}
        self._saved_cursor: Mapping[str, int] | None = None
        self._saved_at = clock()
        self._save_took = 0.0

    def __enter__(self) -> Checkpointer:
        """Open and lock the folder. Collective over the world.

        Raises:
            CheckpointError: another run is in it, or it can't be used.
        """

        def open_folder() -> None:
            if world_rank() == 0:
                self._folder = CheckpointFolder(self._plan.folder)

        try:
            agree("opening the checkpoint folder", open_folder)
        except MegascoreError:
            self._close()
            raise
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say in the progress file how it ended, and release the folder. Not collective."""
        self._signals.__exit__(kind, error, trace)
        if error is not None and self._status is not None and not isinstance(error, Preempted):
            is_users = isinstance(error, MegascoreError) and not isinstance(error, RankFailure)
            state = RunState.FAILED if is_users else RunState.INTERRUPTED
            text = str(error).splitlines() or [type(error).__name__]
            try:
                self._status.update({"state": state.value, "error": text[0]}, now=True)
            except OSError as second:
                # The error that ended the run is raised on; this one is only told.
                self._say(f"{PROGRESS_NAME} could not be written either: {second}")
        self._close()

    def find(self, identity: Mapping[str, Any]) -> Snapshot | None:
        """Return the checkpoint to go on from, the same on every rank; None to start from the beginning.

        Collective over the world. Changes nothing in the folder, unless the run starts afresh.

        Args:
            identity: What the results depend on.

        Raises:
            CheckpointError: there is a checkpoint, and it is damaged or another run's; every difference is named.
        """
        self._identity = identity
        found = agree("looking for a checkpoint", lambda: self._find_here(identity) if world_rank() == 0 else None)
        data = share(found.data if found is not None else None)
        if data is None:
            return None
        snapshot = agree("reading the checkpoint", lambda: Snapshot.from_bytes(data))
        self._saved_cursor = snapshot.cursor
        return snapshot

    def begin(self, total_steps: int, snapshot: Snapshot | None, facts: Mapping[str, Any]) -> None:
        """Start the clock and the progress file. Collective over the world.

        Args:
            total_steps: Of the whole run.
            snapshot: What the run goes on from.
            facts: Entries for the progress file.
        """

        def write() -> None:
            if self._folder is None:
                return
            self._status = StatusFile(self._folder.path, total_steps, facts)
            last = self._folder.last_good()
            entry = None if last is None or snapshot is None else {"file": last.name, "step": snapshot.step}
            self._status.update({"step": 0 if snapshot is None else snapshot.step, "last_checkpoint": entry}, now=True)

        self._agree_on_storage("writing the progress file", write)
        self._saved_at = self._clock()

    def between_steps(
        self,
        run: ScoringRun,
        cursor: Mapping[str, int],
        sums: Callable[[], Mapping[str, Tensor]] = dict,
        *,
        is_last: bool = False,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Save if it is time, and stop if a signal asked for it.

        Collective over the world: one small all-reduce, and the merging of all states where the run saves.

        Args:
            run: No step of it is under way.
            cursor: How far the data has been used.
            sums: Collective; what else has to be saved, merged over all ranks.
            is_last: Nothing is left to be done, so there is nothing to stop.
            progress: Entries for the progress file, read on rank 0 only.

        Raises:
            Preempted: a signal came; everything is saved.
            CheckpointError, RankFailure: a checkpoint could not be written; the last good one stands.
        """
        self._note_progress(cursor, progress or {})
        wishes = [int(self._signals.stop or 0), int(self._is_due(cursor)), int(self._status_error is not None)]
        stop, save, failed = max_over_world(wishes)
        if failed:
            self._agree_on_storage(f"writing the progress file at step {cursor['step']}", self._raise_status_error)
        stops = bool(stop) and not is_last
        if (save or stops) and dict(cursor) != self._saved_cursor and cursor["step"] > 0:
            self._save(run, cursor, sums)
        if stops:
            self._stop(stop, cursor)

    def finish(self) -> None:
        """Say that the result is written. Collective over the world."""

        def write() -> None:
            if self._status is not None:
                self._status.update({"state": RunState.FINISHED.value, "eta_seconds": 0}, now=True)

        self._agree_on_storage("writing the progress file", write)

    # What rank 0 does

    def _find_here(self, identity: Mapping[str, Any]) -> Found | None:
        assert self._folder is not None
        # A restart by torchrun goes on, also where the user wanted the run to begin afresh.
        if self._plan.afresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self._folder.drop_all()
            return None
        found = self._folder.newest()
        if found is None:
            self._refuse_lost_checkpoints()
            return None
        other = differences(found.snapshot.identity, identity)
        if other:
            raise CheckpointError(
                f"{found.path} is another run's: {'; '.join(other)}. Start with the old settings, choose another "
                "run.checkpoint_dir, or start from the beginning with run.resume=never."
            )
        for text in found.skipped:
            self._say(f"damaged checkpoint left out: {text}")
        self._say(f"going on from {found.path}, step {found.snapshot.step}")
        self._folder.trust(found)
        return found

    def _refuse_lost_checkpoints(self) -> None:
        try:
            status = read_status(self._plan.folder)
        except CheckpointError:
            return
        last = status.get("last_checkpoint")
        if last is not None:
            raise CheckpointError(
                f"{self._plan.folder} has no checkpoint, but its {PROGRESS_NAME} tells of {last.get('file')}: it was "
                "removed. Put it back, or start from the beginning with run.resume=never."
            )

    def _is_due(self, cursor: Mapping[str, int]) -> bool:
        """Tell whether a checkpoint is due: by request on any rank, by steps and clock on rank 0."""
        if self._signals.save:
            self._signals.save = False
            return True
        if world_rank() != 0:
            return False
        if self._plan.interval is not None and cursor["step"] % self._plan.interval == 0:
            return True
        waited = self._clock() - self._saved_at
        return self._plan.seconds is not None and waited >= max(self._plan.seconds, SAVE_SHARE * self._save_took)

    def _save(self, run: ScoringRun, cursor: Mapping[str, int], sums: Callable[[], Mapping[str, Tensor]]) -> None:
        started = self._clock()
        snapshot = Snapshot(dict(cursor), self._identity, run.merged_states(), sums())
        step = cursor["step"]

        def write() -> None:
            if self._folder is None:
                return
            folder = self._folder
            data = snapshot.to_bytes()
            path = within(self._plan.write_seconds, lambda: folder.write(snapshot, data))
            seconds = self._clock() - started
            self._say(f"checkpoint of step {step}: {path}, {len(data) / 1e6:,.1f} MB in {seconds:.2f} s")
            if self._status is not None:
                entry = {"file": path.name, "step": step, "bytes": len(data), "seconds": round(seconds, 3)}
                self._status.update({"last_checkpoint": entry}, now=True)

        self._agree_on_storage(f"writing the checkpoint of step {step}", write)
        self._saved_cursor = dict(cursor)
        self._saved_at = self._clock()
        self._save_took = self._saved_at - started

    def _stop(self, number: int, cursor: Mapping[str, int]) -> None:
        name = signal.Signals(number).name

        def write() -> None:
            if self._status is not None:
                self._status.update({"state": RunState.STOPPED.value}, now=True)

        self._agree_on_storage("writing the progress file", write)
        raise Preempted(
            f"stopped by {name} after step {cursor['step']}; everything is saved in {self._plan.folder}, and the same "
            "command goes on from there."
        )

    def _note_progress(self, cursor: Mapping[str, int], progress: Mapping[str, Any]) -> None:
        if self._status is None:
            return
        try:
            self._status.update({**cursor, **progress})
        except OSError as error:
            # Told to the other ranks in the next collective, where they wait anyway.
            self._status_error = error

    def _raise_status_error(self) -> None:
        if self._status_error is not None:
            raise self._status_error

    def _agree_on_storage(self, what: str, function: Callable[[], None]) -> None:
        """Run what touches the folder; a refusal of the system becomes an error that names rank and path."""

        def guarded() -> None:
            try:
                function()
            except OSError as error:
                raise CheckpointError(self._storage_text(what, error)) from error

        agree(what, guarded)

    def _storage_text(self, what: str, error: OSError) -> str:
        last = self._folder.last_good() if self._folder is not None else None
        stands = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
        return (
            f"{what} in {self._plan.folder} failed on rank {world_rank()}: {error.strerror or error}; {stands}. Mend "
            "the storage and run the same command: it goes on from there."
        )

    def _say(self, text: str) -> None:
        self._console.print(f"megascore: {text}", markup=False, highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder = None
