"""This rank's position on Megatron's parallel axes, and the process groups behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megascore.errors import LayoutError
from megascore.parallel.axes import Axis

__all__ = ["AxisGroups", "DenseGroups", "ExpertGroups", "data_axis", "is_first_tensor_rank"]


@dataclass(frozen=True)
class AxisGroups:
    """Process groups by the name of their axis; none in a process by itself."""

    groups: Mapping[str, dist.ProcessGroup]

    def axis(self, name: str) -> Axis:
        """Return this rank's position on an axis; an axis without a group has one rank."""
        group = self.groups.get(name)
        return Axis(name, 0, 1) if group is None else Axis(name, group.rank(), group.size())

    def larger_than_one(self, *names: str) -> dict[str, dist.ProcessGroup]:
        """Return the groups of those named axes that have more than one rank."""
        return {name: self.groups[name] for name in names if self.axis(name).size > 1}


class DenseGroups(AxisGroups):
    """The axes that the dense layers of a model are spread over: ``tp``, ``cp``, ``dp`` and ``pp``."""

    @classmethod
    def of(cls, module: nn.Module) -> DenseGroups:
        """Read the groups that the module was built with, and Megatron's global ones for the rest.

        Raises:
            LayoutError: torch.distributed runs, but neither the module nor Megatron knows the groups.
        """
        if not dist.is_initialized():
            return cls({})
        own = getattr(module, "pg_collection", None)
        groups = {
            "tp": getattr(module, "tp_group", None) or getattr(module, "_tp_group", None) or getattr(own, "tp", None),
            "cp": getattr(own, "cp", None),
            "dp": getattr(own, "dp", None),
            "pp": getattr(own, "pp", None),
        }
        return cls({name: group or _global_group(name) for name, group in groups.items()})


class ExpertGroups(AxisGroups):
    """The axes that routed experts are spread over.

    ``ep`` (other experts), ``etp`` (other channels of an expert), ``edp`` (other tokens) and ``pp``. They cut the same
    ranks in another way than the dense axes do.
    """

    @classmethod
    def of(cls, moe_layer: nn.Module, dense: DenseGroups) -> ExpertGroups:
        """Read the groups that a layer of experts was built with, and Megatron's global ones for the rest.

        Raises:
            LayoutError: torch.distributed runs, but neither the module nor Megatron knows the groups.
        """
        if not dist.is_initialized():
            return cls({})
        experts = moe_layer.experts
        groups = {
            "ep": getattr(moe_layer, "ep_group", None) or getattr(experts, "ep_group", None),
            "etp": getattr(experts, "tp_group", None),
            "edp": getattr(experts, "dp_group", None),
        }
        return cls({**{name: group or _global_group(name) for name, group in groups.items()}, "pp": dense.groups["pp"]})


def data_axis() -> Axis:
    """Return this rank's position on the data-parallel axis of Megatron's global groups, which must be there."""
    return Axis("dp", parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())


def is_first_tensor_rank() -> bool:
    """Tell whether this rank is the first of its tensor-parallel group, which must be there."""
    return bool(parallel_state.get_tensor_model_parallel_rank() == 0)


def _global_group(name: str) -> dist.ProcessGroup:
    if not parallel_state.model_parallel_is_initialized():
        raise LayoutError(
            f"the '{name}' process group is unknown: neither the module has it nor is Megatron's parallel_state "
            "initialized. Call megatron.core.parallel_state.initialize_model_parallel() before attaching."
        )
    getters: dict[str, Callable[[], dist.ProcessGroup]] = {
        "tp": parallel_state.get_tensor_model_parallel_group,
        "cp": parallel_state.get_context_parallel_group,
        "dp": parallel_state.get_data_parallel_group,
        "pp": parallel_state.get_pipeline_model_parallel_group,
        "ep": parallel_state.get_expert_model_parallel_group,
        "etp": parallel_state.get_expert_tensor_parallel_group,
        "edp": parallel_state.get_expert_data_parallel_group,
    }
    return getters[name]()
