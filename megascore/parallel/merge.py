"""Merging the statistics of many hooks over the whole world, in one collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascore.errors import LayoutError
from megascore.hooks.statistics import Statistic
from megascore.parallel.axes import Placement, in_own_dtype
from megascore.parallel.comm import gather_objects, sum_in_place

__all__ = ["Part", "Plan", "agree_on_plan", "contributions", "merge_over_world", "union_of_plans"]

Plan = Mapping[str, tuple[Statistic, ...]]
"""The statistics, in global terms, of every place in the world by its name: the same mapping on every rank."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of one place."""

    placement: Placement
    statistics: tuple[Statistic, ...]
    """In global terms."""
    state: Mapping[str, Tensor]


def agree_on_plan(own: Mapping[str, tuple[Statistic, ...]]) -> Plan:
    """Return the union of all ranks' places, sorted by name.

    Collective over the world.

    Raises:
        LayoutError: on every rank, where two ranks declare other statistics for one place.
    """
    return union_of_plans(dict(enumerate(gather_objects(dict(own)))))


def union_of_plans(plans: Mapping[int, Plan]) -> Plan:
    """Return the union of the places of all ranks, given by rank, sorted by name. Pure.

    Raises:
        LayoutError: two ranks declare other statistics for one place.
    """
    plan: dict[str, tuple[Statistic, ...]] = {}
    owners: dict[str, int] = {}
    for rank, declared in plans.items():
        for name, statistics in declared.items():
            if plan.setdefault(name, statistics) != statistics:
                raise LayoutError(
                    f"ranks {owners[name]} and {rank} differ at {name}: {plan[name]} against {statistics}. "
                    "All ranks must attach the same scores to the same model."
                )
            owners.setdefault(name, rank)
    return dict(sorted(plan.items()))


def contributions(plan: Plan, parts: Mapping[str, Part], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return what this rank adds to the sum over the world: for each place its statistics, [global shape] float64.

    Zeros for places that live on other ranks. Pure.
    """
    return {name: _contributions_of(statistics, parts.get(name), device) for name, statistics in plan.items()}


def merge_over_world(plan: Plan, parts: Mapping[str, Part], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return the merged statistics of every place in the world, on every rank.

    Collective over the world: one all-reduce, whatever the number of places. The parts are not changed.

    Returns:
        By place and statistic, [global shape], in the statistic's dtype.
    """
    merged = contributions(plan, parts, device)
    sum_in_place([merged[name][statistic.name] for name, statistics in plan.items() for statistic in statistics])
    return {
        name: {statistic.name: in_own_dtype(statistic, merged[name][statistic.name]) for statistic in statistics}
        for name, statistics in plan.items()
    }


def _contributions_of(statistics: Sequence[Statistic], part: Part | None, device: torch.device) -> dict[str, Tensor]:
    if part is None:
        return {s.name: torch.zeros(s.shape, dtype=torch.float64, device=device) for s in statistics}
    return {
        statistic.name: part.placement.contribution(statistic, part.state[statistic.name]) for statistic in statistics
    }
