"""The end of a run when its scores are sure enough, the same on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megascore.parallel.comm import broadcast_object, world_rank
from megascore.runs.scoring_run import ScoringRun
from megascore.scores.uncertainty import Uncertainty, overlaps
from megascore.sites.step_groups import NUM_GROUPS

__all__ = ["Until", "is_looked_at"]

logger = logging.getLogger(__name__)

FIRST = 2 * NUM_GROUPS
"""Steps before the first look: two in each group."""
GROWTH = 1.25
"""Each look is after so many times the steps of the one before: it costs what the end of a run does."""


def is_looked_at(step: int) -> bool:
    """Tell whether the scores are looked at after so many steps; always when all groups have equally many.

    >>> [step for step in range(130) if is_looked_at(step)]
    [16, 24, 32, 40, 48, 56, 64, 80, 96, 120]
    """
    look = FIRST
    while look < step:
        look = max(look + NUM_GROUPS, int(look * GROWTH) // NUM_GROUPS * NUM_GROUPS)
    return look == step


class Until:
    """Looks at a run now and then, and says when it has what was asked for."""

    def __init__(self, wanted: Mapping[str, float] | None) -> None:
        """Take ``{"overlap": part}``; None never ends a run."""
        self._wanted = None if wanted is None else float(wanted["overlap"])
        self._found: dict[str, float] = {}
        self._is_reached = False

    def is_reached(self, run: ScoringRun) -> bool:
        """Tell whether the run can end after the steps that it has. Collective over the world when it looks."""
        if self._wanted is None or not is_looked_at(run.num_steps):
            return False
        self._look(run.finish().uncertainty)
        return self._is_reached

    def _look(self, uncertainty: Mapping[str, Uncertainty]) -> None:
        assert self._wanted is not None
        found = overlaps(uncertainty)
        is_reached = bool(found) and min(found.values()) >= self._wanted
        # All ranks compute it of the same sums; one of them decides, whatever the last digit of the others says.
        told = broadcast_object((found, is_reached) if world_rank() == 0 else ({}, False))
        self._found, self._is_reached = told

    def facts(self) -> dict[str, Any]:
        """Return what the score file says of it; nothing where nothing was asked for. Not collective."""
        if self._wanted is None:
            return {}
        return {"until": {"overlap": self._wanted, "reached": self._is_reached, "last_look": self._found}}

    def tell(self, num_steps: int, total_steps: int) -> None:
        """Say on rank 0 how the run ended. Not collective."""
        if self._wanted is None or world_rank() != 0:
            return
        found = ", ".join(f"{name} {value:.3f}" for name, value in self._found.items()) or "nothing was known"
        if self._is_reached:
            logger.info("run.until was reached after %d of %d steps: %s", num_steps, total_steps, found)
        else:
            logger.warning(
                "run.until: an overlap of %g was not reached in all %d steps (at the last look: %s). The file says how "
                "many tokens it would take.",
                self._wanted,
                total_steps,
                found,
            )
