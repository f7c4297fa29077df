"""The loop of every way to run: step after step, and between two steps whoever watches has a say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from megascore.runs.scoring_run import ScoringRun

__all__ = ["Cursor", "OnStep", "run_steps"]


@dataclass(frozen=True)
class Cursor:
    """How far a run is, between two steps."""

    step: int
    """Steps done: of the run, or of the block that runs."""
    block: int | None
    """Blocks done; None where all of them run together."""
    modules: Sequence[nn.Module]
    """The model on this rank."""


OnStep = Callable[[Cursor], object]
"""Looks at a run between two steps, and ends it by raising."""


def run_steps(
    steps: Iterable[int],
    run_step: Callable[[int], object],
    runs: Sequence[ScoringRun] = (),
    *,
    before: Callable[[int], object] | None = None,
    after: Callable[[int], object] | None = None,
) -> None:
    """Run steps one after the other. Collective where `ScoringRun.step` is, and as the functions are.

    Args:
        steps: Their numbers, in order.
        run_step: Runs the data of a step through the modules on which the hooks are.
        runs: The runs whose hooks these are; each ends the step.
        before: Is called with the number of each step before it begins.
        after: Is called with it when the step has ended.
    """
    for step in steps:
        if before is not None:
            before(step)
        run_step(step)
        for run in runs:
            run.step()
        if after is not None:
            after(step)
