"""Checkpoints for a run in somebody's own loop, which saves as it goes and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from megascore.config import RESUME
from megascore.errors import ConfigError
from megascore.process.signals import Signals
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.plan import CheckpointPlan
from megascore.resume.snapshot import identity_of
from megascore.runs.progress import ScoringProgress
from megascore.runs.scoring_run import ScoringRun

__all__ = ["Saver", "checkpoints"]


def checkpoints(
    run: ScoringRun,
    folder: str | Path,
    *,
    total_steps: int,
    identity: Mapping[str, Any] | None = None,
    interval: int | None = None,
    seconds: float | None = 300.0,
    resume: str = "auto",
) -> AbstractContextManager[Saver]:
    """Save a run in your own loop, and go on with it when the program is started again, also on another layout.

    Where it goes on is known inside the ``with`` block: ``saver.step`` steps are done, and your loop leaves out their
    data. A step has to hold the same samples whatever the layout: cut the global batch over data-parallel ranks, not
    the data set.

    ``megascore/api/README.md`` has a whole loop.

    Args:
        run: From `attach`, with no step done.
        folder: Of this run alone; made if it is missing. Rank 0 reads and writes it.
        total_steps: Of the whole run.
        identity: What else the scores depend on, as JSON-able values: data and its order, weights, batch size. A
            checkpoint of another identity is refused, with every difference named. Sizes of the model, scores and
            ``total_steps`` are compared in any case.
        interval: Steps between checkpoints.
        seconds: Time between checkpoints, by rank 0's clock; None saves by ``interval`` and on signals alone.
        resume: "auto" goes on from the newest checkpoint, "never" drops those that are there.

    Returns:
        A context manager. Entering it is collective over the world: it opens the folder, and puts the newest checkpoint
        into the run's hooks. `megascore status FOLDER` shows the run meanwhile.

    Raises:
        ConfigError: an unknown ``resume``, no steps, or a run that has begun.
        CheckpointError: on entering: the folder is in use or can't be used, or its checkpoint is damaged or another
            run's.
    """
    if resume not in RESUME:
        raise ConfigError(f"resume is {resume!r}: expected one of {', '.join(RESUME)}.")
    if total_steps < 1:
        raise ConfigError(f"total_steps is {total_steps}: expected the number of steps of the whole run.")
    if run.num_steps:
        raise ConfigError(f"the run has done {run.num_steps} steps: enter megascore.checkpoints before the first one.")
    plan = CheckpointPlan(Path(folder), interval, seconds, afresh=resume == "never")
    # A name is often a path, and a model may be moved.
    model = {name: value for name, value in run.view.facts.items() if name != "name"}
    whole = identity_of(run.requests, model=model, run={"steps": total_steps}, yours=identity or {})
    return _saving(run, plan, total_steps, whole)


@contextmanager
def _saving(run: ScoringRun, plan: CheckpointPlan, total_steps: int, identity: Mapping[str, Any]) -> Iterator[Saver]:
    with Signals() as signals, Checkpointer(plan, Console(stderr=True), signals) as checkpoints:
        snapshot = checkpoints.find(identity)
        if snapshot is not None:
            run.restore(snapshot.states, snapshot.step)
        # Tokens are counted on the devices, which are not asked at every step.
        checkpoints.begin(total_steps, snapshot, {"layout": dict(run.view.layout), "tokens": None})
        with ScoringProgress(total_steps, 0, enabled=False, done_steps=run.num_steps) as progress:
            yield Saver(run, checkpoints, progress, total_steps)


class Saver:
    """A run that is saved as it goes: what `checkpoints` gives inside its ``with`` block."""

    def __init__(self, run: ScoringRun, checkpoints: Checkpointer, progress: ScoringProgress, total_steps: int) -> None:
        """Hold them together; `checkpoints` makes it."""
        self._run = run
        self._checkpoints = checkpoints
        self._progress = progress
        self._total_steps = total_steps

    @property
    def step(self) -> int:
        """Steps done, those before a restart included: the same on every rank."""
        return self._run.num_steps

    @property
    def finished(self) -> bool:
        """Whether an earlier start has come to `finish`; the same on every rank. All steps are done then."""
        return self._checkpoints.was_finished

    def after_step(self) -> None:
        """Save if it is time, after ``run.step()``; stop if a signal asked for it.

        Collective over the world: one small all-reduce, and the merging of all states where the run saves. SIGTERM and
        SIGUSR1 to any rank save and stop all of them, SIGUSR2 saves.

        Raises:
            Preempted: a signal came, and everything is saved: the same program goes on when it is started again.
            CheckpointError: the checkpoint could not be written; the last good one stands.
            RankFailure: that happened to rank 0.
        """
        self._progress.advance()
        left = self._progress.seconds_left
        self._checkpoints.between_steps(
            self._run,
            {"step": self.step},
            is_last=self.step >= self._total_steps,
            progress={"eta_seconds": None if left is None else round(left, 1)},
        )

    def finish(self) -> None:
        """Say in ``progress.json`` that the result is written. Collective over the world."""
        self._checkpoints.finish()
