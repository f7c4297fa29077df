"""When a run saves, goes on and stops: decided between steps, by all ranks together.

Rank 0 alone reads and writes the folder; what it finds or fails with is told to all. A checkpoint is the merged state
of all ranks, taken between two steps, so that a step counts in it as a whole or not at all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar

from rich.console import Console
from torch import Tensor

from megascore.errors import CheckpointError, MegascoreError, Preempted, RankFailure
from megascore.hooks.statistics import State
from megascore.parallel.comm import agree, broadcast_object, max_over_world, world_rank
from megascore.process.signals import Signals
from megascore.resume.keeper import CheckpointKeeper, CheckpointPlan
from megascore.resume.progress_file import RunState
from megascore.resume.snapshot import Snapshot, describe_cursor

__all__ = ["CheckpointPlan", "Checkpointer"]

Result = TypeVar("Result")

SAVE_SHARE = 100
"""A checkpoint that the clock asks for comes after at least this many times what the last one took: 1 % of a run."""


class HasStates(Protocol):
    """What is saved."""

    def merged_states(self) -> Mapping[str, State]:
        """Return the statistics of all sites, in global terms. Collective over the world."""


class Checkpointer:
    """Checkpoints of one run; ``with Checkpointer(plan, console) as checkpoints``. Its methods are collective.

    While its ``with`` block runs, SIGTERM and SIGUSR1 to any rank make all ranks save at the end of the step and raise
    `Preempted`, and SIGUSR2 makes them save and go on.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        console: Console,
        *,
        signals: Signals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; the folder is opened by ``with``.

        Args:
            plan: The same on all ranks.
            console: Where rank 0 says what it saved.
            signals: Noted already since earlier; otherwise they are from ``with`` on.
            clock: Seconds, for tests.
        """
        self._plan = plan
        self._console = console
        self._clock = clock
        self._owns_signals = signals is None
        self._signals = signals or Signals()
        self._keeper: CheckpointKeeper | None = None
        self._note_error: CheckpointError | None = None
        self._identity: Mapping[str, Any] = {}
        self._saved_cursor: Mapping[str, int] = {}
        self._total_steps = 1
        self.was_finished = False
        """Whether an earlier start has finished the run; known from `find` on."""
        self._saved_at = clock()
        self._save_took = 0.0

    def __enter__(self) -> Checkpointer:
        """Open and lock the folder. Collective over the world.

        Raises:
            CheckpointError: another run is in it, or it can't be used.
        """

        def open_folder() -> None:
            if world_rank() == 0:
                self._keeper = CheckpointKeeper(self._plan, self._say)

        agree("opening the checkpoint folder", open_folder)
        if self._owns_signals:
            self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say in the progress file how it ended, and release the folder. Not collective."""
        if self._owns_signals:
            self._signals.__exit__(kind, error, trace)
        if self._keeper is None:
            return
        try:
            if error is not None and not isinstance(error, Preempted):
                is_users = isinstance(error, MegascoreError) and not isinstance(error, RankFailure)
                state = RunState.FAILED if is_users else RunState.INTERRUPTED
                self._keeper.end(state, (str(error).splitlines() or [type(error).__name__])[0])
        except CheckpointError as second:
            # The error that ended the run is the one that goes on; this one is only told.
            self._say(str(second))
        finally:
            self._keeper.close()
            self._keeper = None

    def find(self, identity: Mapping[str, Any]) -> Snapshot | None:
        """Return the checkpoint to go on from, the same on every rank; None to start from the beginning.

        Collective over the world. Changes nothing in the folder, unless the run starts afresh.

        Args:
            identity: What the results depend on.

        Raises:
            CheckpointError: there is a checkpoint, and it is damaged or another run's; every difference is named.
        """
        self._identity = identity
        found = self._on_rank_0("looking for a checkpoint", lambda keeper: keeper.find(identity))
        data = broadcast_object(found.data if found is not None else None)
        if data is None:
            return None
        # Asked after a fresh start has dropped what an earlier run said of itself.
        finished = self._on_rank_0("looking at the folder", lambda keeper: keeper.is_finished)
        self.was_finished = bool(broadcast_object(finished))
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
        self._on_rank_0("beginning the progress file", lambda keeper: keeper.begin(total_steps, snapshot, facts))
        self._total_steps = max(1, total_steps)
        self._saved_at = self._clock()

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
            cursor: How far the data has been used. What the checkpoint is of, so in the midst of a block it stays that
                of the block's beginning.
            sums: Collective; what else has to be saved, merged over all ranks.
            is_last: Nothing is left to be done, so there is nothing to stop.
            progress: Entries for the progress file, read on rank 0 only.

        Raises:
            Preempted: a signal came; everything is saved.
            CheckpointError, RankFailure: the storage failed; the last good checkpoint stands.
        """
        self._note({**cursor, **(progress or {})})
        wishes = [int(self._signals.stop or 0), int(self._is_due(cursor)), int(self._note_error is not None)]
        stop, save, failed = max_over_world(wishes)
        if failed:
            agree(f"telling the progress at {describe_cursor(cursor)}", self._raise_note_error)
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
        """Say that the result is written. Collective over the world."""
        self._on_rank_0("ending the progress file", lambda keeper: keeper.end(RunState.FINISHED))

    def note_finished(self) -> None:
        """Let the folder say that the run is finished, as its result shows. Collective over the world."""
        self._on_rank_0("ending the progress file", lambda keeper: keeper.note_finished())

    def _stop(self, number: int, cursor: Mapping[str, int]) -> None:
        self._on_rank_0("ending the progress file", lambda keeper: keeper.end(RunState.STOPPED))
        name = signal.Signals(number).name
        again = "the same command" if not self._plan.afresh else "the same command with run.resume=auto"
        if not any(cursor.values()):
            raise Preempted(f"stopped by {name} before anything was done; {again} begins again.")
        raise Preempted(
            f"stopped by {name} after {describe_cursor(cursor)}; everything is saved in {self._plan.folder}, and "
            f"{again} goes on from there."
        )

    def _is_due(self, cursor: Mapping[str, int]) -> bool:
        """Tell whether a checkpoint is due: by request on any rank, by steps and clock on rank 0."""
        if self._signals.save:
            self._signals.save = False
            return True
        if world_rank() != 0:
            return False
        if self._plan.interval is not None and self._is_multiple(cursor, self._plan.interval):
            return True
        waited = self._clock() - self._saved_at
        return self._plan.seconds is not None and waited >= max(self._plan.seconds, SAVE_SHARE * self._save_took)

    def _is_multiple(self, cursor: Mapping[str, int], interval: int) -> bool:
        """Tell whether the steps so far are a multiple of the interval, or came past one in the last block."""
        if "block" not in cursor:
            return cursor["step"] % interval == 0
        steps = cursor["block"] * self._total_steps
        return steps // interval > (steps - self._total_steps) // interval

    def _save(self, run: HasStates, cursor: Mapping[str, int], sums: Callable[[], Mapping[str, Tensor]]) -> None:
        started = self._clock()
        snapshot = Snapshot(dict(cursor), self._identity, run.merged_states(), sums())
        self._on_rank_0(
            f"saving after {describe_cursor(cursor)}",
            lambda keeper: keeper.save(snapshot, lambda: self._clock() - started),
        )
        self._saved_cursor = dict(cursor)
        self._saved_at = self._clock()
        self._save_took = self._saved_at - started

    def _note(self, entries: Mapping[str, Any]) -> None:
        if self._keeper is None:
            return
        try:
            self._keeper.note(entries)
        except CheckpointError as error:
            # Told to the other ranks in the next collective, where they wait anyway.
            self._note_error = error

    def _raise_note_error(self) -> None:
        if self._note_error is not None:
            raise self._note_error

    def _on_rank_0(self, what: str, function: Callable[[CheckpointKeeper], Result]) -> Result | None:
        """Return the function's value on rank 0, None elsewhere; its error is told to all."""
        return agree(what, lambda: None if self._keeper is None else function(self._keeper))

    def _say(self, text: str) -> None:
        self._console.print(f"megascore: {text}", markup=False, highlight=False, soft_wrap=True)
