"""Looking into the plan of a dry run."""

from __future__ import annotations

from megascore.job.planned import DryRun, RankPlan

__all__ = ["plan_of"]


def plan_of(planned: DryRun, rank: int) -> RankPlan:
    """Return the plan of one rank."""
    return next(group.plan for group in planned.groups if rank in group.ranks)
