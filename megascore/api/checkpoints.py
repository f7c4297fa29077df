"""Checkpoints for a run in somebody's own loop: `checkpoints` saves it as it goes, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megascore.errors import ConfigError
from megascore.files.tensor_file import json_text
from megascore.resume.checkpointing import Checkpointer, CheckpointPlan
from megascore.resume.snapshot import identity_of
from megascore.runs.progress import ScoringProgress
from megascore.runs.scoring_run import ScoringRun
from megascore.versions import installed_versions

__all__ = ["Saver", "checkpoints"]

RESUME = ("auto", "never")


def checkpoints(
    run: ScoringRun,
    folder: str | Path,
    *,
    total_steps: int,
    identity: Mapping[str, Any] | None = None,
    interval: int | None = None,
    seconds: float | None = 300.0,
    resume: str = "auto",
) -> Saver:
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
        A context manager. Entering it is collective over the world; `megascore status FOLDER` shows the run meanwhile.

    Raises:
        ConfigError: an unknown ``resume``, no steps, or a run that has begun.
    """
    if resume not in RESUME:
        raise ConfigError(f"resume is {resume!r}: expected one of {', '.join(RESUME)}.")
    if total_steps < 1:
        raise ConfigError(f"total_steps is {total_steps}: expected the number of steps of the whole run.")
    if run.num_steps:
        raise ConfigError(f"the run has done {run.num_steps} steps: enter megascore.checkpoints before the first one.")
    plan = CheckpointPlan(Path(folder), interval, seconds, afresh=resume == "never")
    return Saver(run, plan, total_steps, _identity(run, total_steps, identity or {}))


class Saver:
    """What `checkpoints` returns; to be entered once."""

    def __init__(self, run: ScoringRun, plan: CheckpointPlan, total_steps: int, identity: Mapping[str, Any]) -> None:
        """Prepare; the folder is opened by ``with``."""
        self._run = run
        self._total_steps = total_steps
        self._identity = identity
        self._checkpoints = Checkpointer(plan, Console(stderr=True))
        self._progress = ScoringProgress(total_steps, 0, enabled=False)

    @property
    def step(self) -> int:
        """Steps done, those before a restart included: the same on every rank."""
        return self._run.num_steps

    @property
    def finished(self) -> bool:
        """Whether an earlier start has come to `finish`; the same on every rank. All steps are done then."""
        return self._checkpoints.was_finished

    def __enter__(self) -> Saver:
        """Open the folder, and put the newest checkpoint into the run's hooks. Collective over the world.

        Raises:
            CheckpointError: the folder is in use or can't be used, or its checkpoint is damaged or another run's.
        """
        self._checkpoints.__enter__()
        try:
            self._begin()
        except BaseException as error:
            self._checkpoints.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say in ``progress.json`` how it ended, and release the folder. Not collective."""
        self._checkpoints.__exit__(kind, error, trace)

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

    def _begin(self) -> None:
        snapshot = self._checkpoints.find(self._identity)
        if snapshot is not None:
            self._run.restore(snapshot.states, snapshot.step)
        # Tokens are counted on the devices, which are not asked at every step.
        facts = {"layout": dict(self._run.view.layout), "tokens": None}
        self._checkpoints.begin(self._total_steps, snapshot, facts)
        self._progress = ScoringProgress(self._total_steps, 0, enabled=False, done_steps=self.step).__enter__()


def _identity(run: ScoringRun, total_steps: int, given: Mapping[str, Any]) -> dict[str, Any]:
    # A name is often a path, and a model may be moved.
    model = {name: value for name, value in run.view.facts.items() if name != "name"}
    scores = [{"target": r.target, "method": r.method, **dict(r.options)} for r in run.requests]
    whole = {
        "model": model,
        "run": {"steps": total_steps, "megascore": installed_versions()["megascore"]},
        "scores": scores,
        "yours": dict(given),
    }
    try:
        # As a checkpoint has it, where a tuple is a list.
        return identity_of(**json.loads(json_text(whole)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the identity of the run has something that JSON can't hold: {error}.") from error
