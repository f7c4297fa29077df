"""Statistics of groups of steps, beside those of the whole run: how far they differ tells how sure a score is.

Step number n belongs to group n mod `NUM_GROUPS`, so samples fall into groups by their number in the data, the same in
every layout and after a restart. No activation is read again: when a step ends, what it has added to the accumulators
of a hook is added to those of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megascore.hooks.statistics import Merge, State, Statistic

__all__ = [
    "NUM_GROUPS",
    "StepGroups",
    "group_of_step",
    "grouped_name",
    "of_group",
    "statistics_of_groups",
    "without_groups",
]

NUM_GROUPS = 8
_SUFFIX = " by group"


def grouped_name(name: str) -> str:
    """Return the name of a statistic's groups."""
    return f"{name}{_SUFFIX}"


def group_of_step(step: int) -> int:
    """Return the group of a step, counted from 0."""
    return step % NUM_GROUPS


def statistics_of_groups(statistics: Iterable[Statistic]) -> tuple[Statistic, ...]:
    """Return the statistics of groups, [groups, ...]: of all that are sums."""
    return tuple(
        replace(
            statistic,
            name=grouped_name(statistic.name),
            shape=(NUM_GROUPS, *statistic.shape),
            channel_dim=None if statistic.channel_dim is None else statistic.channel_dim + 1,
        )
        for statistic in statistics
        if statistic.merge is Merge.SUM
    )


def without_groups(state: State) -> dict[str, Tensor]:
    """Return a state without the statistics of groups."""
    return {name: value for name, value in state.items() if not name.endswith(_SUFFIX)}


def of_group(state: State, group: int) -> dict[str, Tensor]:
    """Return what one group alone has measured; what is no sum is that of the whole run."""
    return {
        name: state[grouped_name(name)][group] if grouped_name(name) in state else state[name]
        for name in without_groups(state)
    }


class StepGroups:
    """The accumulators of all groups of one hook, on this rank."""

    def __init__(self, statistics: Sequence[Statistic], state: State) -> None:
        """Allocate zeros beside a hook's accumulators.

        Args:
            statistics: Of the hook, in local terms.
            state: Its accumulators, live.
        """
        self._summed = [statistic.name for statistic in statistics if statistic.merge is Merge.SUM]
        with torch.inference_mode(False):
            self._before = {name: state[name].clone() for name in self._summed}
            self.state = {
                grouped_name(name): state[name].new_zeros((NUM_GROUPS, *state[name].shape)) for name in self._summed
            }

    def kept(self) -> tuple[Tensor, ...]:
        """Return all tensors that are kept."""
        return (*self._before.values(), *self.state.values())

    def restore(self, state: State, local: State) -> None:
        """Replace the accumulators by this rank's part of a saved state.

        Args:
            state: The hook's accumulators, restored already.
            local: The part.
        """
        for name in self._summed:
            self._before[name].copy_(state[name])
            self.state[grouped_name(name)].copy_(local[grouped_name(name)])

    @staticmethod
    def fold(of_hooks: Sequence[tuple[StepGroups, State]], group: int) -> None:
        """Add what hooks have added up since the last time to a group, in a few kernels for all of them together.

        Args:
            of_hooks: The groups and accumulators of each hook.
            group: The group of the step that ends.
        """
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for groups, state in of_hooks:
            for name in groups._summed:
                # An accumulator goes along with the activations, to another device if need be.
                now = state[name]
                if groups._before[name].device != now.device:
                    groups._before[name] = groups._before[name].to(now.device)
                    groups.state[grouped_name(name)] = groups.state[grouped_name(name)].to(now.device)
                lists = by_kind.setdefault((now.device, now.dtype), ([], [], []))
                rows = (now, groups._before[name], groups.state[grouped_name(name)][group])
                for values, value in zip(lists, rows, strict=True):
                    values.append(value)
        with torch.no_grad():
            for current, before, of_group in by_kind.values():
                torch._foreach_add_(of_group, torch._foreach_sub(current, before))
                torch._foreach_copy_(before, current)
