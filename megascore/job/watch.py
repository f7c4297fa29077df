"""The watch over a job: between two steps all ranks show how far it is, save, stop, and let an observer look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from megascore.parallel.comm import world_rank
from megascore.resume.checkpointing import Checkpointer, HasStates
from megascore.resume.snapshot import Snapshot
from megascore.runs.progress import ScoringProgress
from megascore.runs.steps import Cursor, OnStep

__all__ = ["Watch"]


@dataclass
class Watch:
    """Looks after one job. Its methods are collective over the world where the job saves, but for `progress`."""

    console: Console
    """Where rank 0 shows how far the job is."""
    checkpoints: Checkpointer | None
    """Where it saves; None for a job that does not."""
    snapshot: Snapshot | None
    """What it goes on from; None at the beginning."""
    facts: Mapping[str, Any]
    """Entries of the progress file."""
    on_step: OnStep | None
    """Is called between steps, before anything is saved."""

    def begin(self, total_steps: int, **facts: Any) -> None:
        """Stop if a signal has asked for it, or let the progress file begin, with more facts.

        Raises:
            Preempted: a signal came.
        """
        if self.checkpoints is not None:
            self.checkpoints.stop_if_asked()
            self.checkpoints.begin(total_steps, self.snapshot, {**self.facts, **facts})

    def progress(self, total_steps: int, tokens_per_step: int, done_steps: int) -> ScoringProgress:
        """Return what rank 0 shows, to be entered; `between` tells the progress file of it."""
        self._progress = ScoringProgress(
            total_steps, tokens_per_step, enabled=world_rank() == 0, done_steps=done_steps, console=self.console
        )
        return self._progress

    def between(
        self,
        cursor: Cursor,
        tokens: int,
        saved: HasStates,
        saved_cursor: Mapping[str, int],
        sums: Callable[[], Mapping[str, Tensor]],
        *,
        is_last: bool,
    ) -> None:
        """Let the observer look, then save if it is time, and stop if a signal asked for it.

        The progress file is told the cursor and the ``tokens`` so far; all other arguments, and what is raised, are
        those of `Checkpointer.between_steps`.
        """
        if self.on_step is not None:
            self.on_step(cursor)
        if self.checkpoints is not None:
            entries = {"step": cursor.step, "tokens": tokens, **self._progress.pace()}
            self.checkpoints.between_steps(saved, saved_cursor, sums, is_last=is_last, progress=entries)
