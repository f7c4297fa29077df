"""A run that saves, goes on and stops: all ranks decide it together, between two steps.

Rank 0 alone has the folder; its findings and its errors are told to all. A checkpoint is the merged state of all ranks,
so that a step counts in it as a whole or not at all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from rich.console import Console
from torch import Tensor

from megascore.errors import CheckpointError, MegascoreError, Preempted, RankFailure
from megascore.files.whole import write_whole
from megascore.hooks.statistics import State
from megascore.parallel.comm import agree, broadcast_object, max_over_world, world_rank
from megascore.process.deadline import within
from megascore.process.launcher import is_restart, launch_name
from megascore.process.signals import Signals
from megascore.resume.folder import RunFolder
from megascore.resume.plan import CheckpointPlan, Timer
from megascore.resume.progress_file import PROGRESS_NAME, RunState
from megascore.resume.snapshot import Snapshot, describe_cursor

__all__ = ["Checkpointer"]

Result = TypeVar("Result")
_WRITING_PROGRESS = f"writing {PROGRESS_NAME}"


class HasStates(Protocol):
    """A run that can be saved."""

    def merged_states(self) -> Mapping[str, State]:
        """Return the statistics of all sites, in global terms. Collective over the world."""


class Checkpointer:
    """Checkpoints of one run; ``with Checkpointer(plan, console, signals) as checkpoints``. Its methods are collective.

    SIGTERM and SIGUSR1 to any rank make all ranks save at the end of the step and raise `Preempted`; SIGUSR2 makes them
    save and go on. Every access to the storage has a deadline, so that a file system that hangs becomes an error while
    the other ranks still wait for it.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        console: Console,
        signals: Signals,
        *,
        write: Callable[..., None] = write_whole,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; the folder is opened by ``with``.

        Args:
            plan: The same on all ranks.
            console: Where rank 0 says what it saved.
            signals: Those of this process, noted for as long as the run lasts.
            write: Writes a file, with the arguments of `write_whole`.
            clock: Returns seconds.
        """
        self._plan = plan
        self._console = console
        self._signals = signals
        self._write = write
        self._clock = clock
        self._folder: RunFolder | None = None
        self._timer: Timer
        self._identity: Mapping[str, Any] = {}
        self._saved_cursor: Mapping[str, int] = {}
        self.was_finished = False
        """Whether an earlier start has finished the run; known from `find` on."""

    def __enter__(self) -> Checkpointer:
        """Open and lock the folder. Collective over the world.

        Raises:
            CheckpointError: another run is in it, or it can't be used.
        """

        def open_folder() -> RunFolder | None:
            return RunFolder(self._plan.folder, self._say, self._write) if world_rank() == 0 else None

        what = "opening the checkpoint folder"
        self._folder = agree(what, lambda: self._storage(what, open_folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say in the progress file how it ended, and release the folder. Not collective."""
        folder = self._folder
        if folder is None:
            return
        try:
            if error is not None and not isinstance(error, Preempted):
                is_users = isinstance(error, MegascoreError) and not isinstance(error, RankFailure)
                state = RunState.FAILED if is_users else RunState.INTERRUPTED
                text = (str(error).splitlines() or [type(error).__name__])[0]
                self._tell(folder, {"state": state.value, "error": text})
        except CheckpointError as second:
            # The error that ended the run is the one that goes on; this one is only told.
            self._say(str(second))
        finally:
            folder.close()
            self._folder = None

    def find(self, identity: Mapping[str, Any]) -> Snapshot | None:
        """Return the checkpoint to go on from, the same on every rank; None to start from the beginning.

        Collective over the world. Changes nothing in the folder, unless the run starts afresh.

        Args:
            identity: What the results depend on.

        Raises:
            CheckpointError: there is a checkpoint, and it is damaged or another run's; every difference is named.
        """
        self._identity = identity

        def find(folder: RunFolder) -> tuple[bytes, bool] | None:
            if self._plan.afresh:
                folder.start_afresh(launch_name(), is_restart=is_restart())
            found = folder.find(identity)
            return None if found is None else (found.data, folder.progress.says_finished())

        found = self._on_rank_0("looking for a checkpoint", find)
        if found is None:
            return None
        data, self.was_finished = found
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

        def begin(folder: RunFolder) -> None:
            found: dict[str, Any] = {}
            if snapshot is not None and folder.last_good is not None:
                found = {**snapshot.cursor, "last_checkpoint": {"file": folder.last_good.name, **snapshot.cursor}}
            folder.progress.begin(total_steps, {**facts, **found})

        self._on_rank_0(_WRITING_PROGRESS, begin)
        self._timer = Timer(self._plan, total_steps, self._clock)

    def between_steps(
        self,
        run: HasStates,
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
            cursor: How far the data has been used, which names the checkpoint: in the midst of a block it stays where
                it was at the block's beginning.
            sums: Collective; what else has to be saved, merged over all ranks.
            is_last: Nothing is left to be done, so there is nothing to stop.
            progress: Entries for the progress file, read on rank 0 only.

        Raises:
            Preempted: a signal came; everything is saved.
            CheckpointError, RankFailure: the storage failed; the last good checkpoint stands.
        """
        failure = self._note({**cursor, **(progress or {})})
        is_due = self._signals.save or (world_rank() == 0 and self._timer.is_due(cursor))
        self._signals.save = False
        wishes = [int(self._signals.stop or 0), int(is_due), int(failure is not None)]
        stop, save, failed = max_over_world(wishes)
        if failed:
            agree(f"telling the progress at {describe_cursor(cursor)}", lambda: _raise(failure))
        stops = bool(stop) and not is_last
        # Also at the end: what comes after it may fail, or be cut short.
        if (save or stops or is_last) and dict(cursor) != self._saved_cursor and any(cursor.values()):
            self._save(run, cursor, sums)
        if stops:
            self._stop(stop, cursor)

    def stop_if_asked(self) -> None:
        """Stop if a signal asked for it, before the first step. Collective over the world: one small all-reduce.

        Raises:
            Preempted: a signal came; nothing was begun that is not saved.
        """
        stop = max_over_world([int(self._signals.stop or 0)])[0]
        if stop:
            self._stop(stop, self._saved_cursor)

    def finish(self) -> None:
        """Let the folder say that the run is finished: its result is written. Collective over the world."""
        self._on_rank_0(_WRITING_PROGRESS, lambda folder: folder.progress.finish())

    def _stop(self, number: int, cursor: Mapping[str, int]) -> None:
        ending = {"state": RunState.STOPPED.value, "error": None}
        self._on_rank_0(_WRITING_PROGRESS, lambda folder: self._tell(folder, ending))
        name = signal.Signals(number).name
        again = "the same command" if not self._plan.afresh else "the same command with run.resume=auto"
        if not any(cursor.values()):
            raise Preempted(f"stopped by {name} before anything was done; {again} begins again.")
        raise Preempted(
            f"stopped by {name} after {describe_cursor(cursor)}; everything is saved in {self._plan.folder}, and "
            f"{again} goes on from there."
        )

    def _save(self, run: HasStates, cursor: Mapping[str, int], sums: Callable[[], Mapping[str, Tensor]]) -> None:
        started = self._clock()
        snapshot = Snapshot(dict(cursor), self._identity, run.merged_states(), sums())
        what = f"checkpoint of {describe_cursor(cursor)}"

        def write(folder: RunFolder) -> None:
            path, size = folder.write(snapshot)
            took = self._timer.saved(started)
            self._say(f"{what}: {path}, {size / 1e6:,.1f} MB in {took:.2f} s")
            entry = {"file": path.name, **cursor, "bytes": size, "seconds": round(took, 3)}
            self._tell(folder, {"last_checkpoint": entry})

        self._on_rank_0(f"writing the {what}", write)
        self._saved_cursor = dict(cursor)

    def _note(self, entries: Mapping[str, Any]) -> CheckpointError | None:
        """Put entries into the progress file, on rank 0; return an error for the next collective, where others wait."""
        folder = self._folder
        if folder is not None:
            try:
                self._storage(_WRITING_PROGRESS, lambda: folder.progress.note(entries))
            except CheckpointError as error:
                return error
        return None

    def _tell(self, folder: RunFolder, entries: Mapping[str, Any]) -> None:
        """Put entries into the progress file at once; on rank 0."""
        self._storage(_WRITING_PROGRESS, lambda: folder.progress.note(entries, now=True))

    def _on_rank_0(self, what: str, function: Callable[[RunFolder], Result]) -> Result:
        """Return on every rank what the function returns on rank 0, where alone it runs; its error is told to all."""
        folder = self._folder
        own = agree(what, lambda: None if folder is None else self._storage(what, lambda: function(folder)))
        return cast("Result", broadcast_object(own))

    def _storage(self, what: str, function: Callable[[], Result]) -> Result:
        """Run what touches the storage, within its time; a refusal of the system becomes an error that names it."""
        try:
            return within(self._plan.storage_seconds, function)
        except OSError as error:
            last = None if self._folder is None else self._folder.last_good
            stands = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
            raise CheckpointError(
                f"{what} failed in {self._plan.folder} (run.checkpoint_dir), on rank 0: {error.strerror or error}; "
                f"{stands}. Mend the storage and run the same command: it goes on from there."
            ) from error

    def _say(self, text: str) -> None:
        self._console.print(f"megascore: {text}", markup=False, highlight=False, soft_wrap=True)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
