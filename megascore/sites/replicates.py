"""Scores of units from merged statistics, and from those without each group of steps in turn; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megascore.hooks.statistics import State
from megascore.sites.step_groups import NUM_GROUPS, grouped_name, without_groups

__all__ = ["Computes", "grouped_sums", "groups_with_data", "replicates", "unit_scores"]


class Computes(Protocol):
    """A hook, or the class of one whose score follows from the state alone."""

    def compute(self, state: State, *, num_calls: float = 1.0) -> Mapping[str, Any]:
        """Return ``score`` [channels]."""


def unit_scores(hook: Computes, state: State, unit_size: int) -> Tensor:
    """Return the score of each unit [units] float64: norm2 over the scores of its ``unit_size`` channels."""
    channels: Tensor = hook.compute(state)["score"].double()
    return channels if unit_size == 1 else channels.view(-1, unit_size).norm(dim=1)


def groups_with_data(state: State) -> list[int]:
    """Return the groups in which a site has seen tokens; none of a state without groups."""
    tokens = state.get(grouped_name("num_tokens"))
    return [] if tokens is None else tokens.nonzero().flatten().tolist()


def grouped_sums(state: State) -> set[str]:
    """Return the names of all statistics of a state that are sums, those of groups among them.

    Groups tell which: what is no sum has none. Hooks whose statistics are too large for groups have nothing but sums.
    """
    if grouped_name("num_tokens") not in state:
        return set(state)
    summed = {name for name in without_groups(state) if grouped_name(name) in state}
    return summed | {grouped_name(name) for name in summed}


def replicates(state: State, score: Callable[[State], Tensor], counted: str) -> Tensor:
    """Return the scores [groups, units] without each of the groups in turn; zeros where a group has no data.

    Sums are scaled to as much data as all groups have, so that scores that grow with it compare with each other.

    Args:
        state: Merged, with groups.
        score: Computes the units' scores [units] from a state without groups.
        counted: The count that tells how much data there is, ``num_tokens`` or ``num_samples``.
    """
    whole = without_groups(state)
    used = groups_with_data(state)
    sums = {
        name: (value.double(), state[grouped_name(name)].double())
        for name, value in whole.items()
        if grouped_name(name) in state
    }
    found: dict[int, Tensor] = {}
    for group in used if len(used) > 1 else []:
        left = float(whole[counted] - state[grouped_name(counted)][group])
        if left <= 0:
            continue
        scale = float(whole[counted]) / left
        found[group] = score({**whole, **{name: (total - rows[group]) * scale for name, (total, rows) in sums.items()}})
    # Their shape, where there are none.
    like = next(iter(found.values())) if found else score(whole)
    return torch.stack([found.get(group, torch.zeros_like(like)) for group in range(NUM_GROUPS)])
