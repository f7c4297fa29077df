"""The roles of Megatron's parallel axes at the modules where scores are taken."""

from __future__ import annotations

from torch import nn

from megascore.errors import LayoutError
from megascore.mcore.groups import DenseGroups
from megascore.parallel.axes import Axis, Placement, Role, Shard

__all__ = ["place_hidden_states", "place_row_parallel_input"]


def place_row_parallel_input(linear: nn.Module, groups: DenseGroups) -> Placement:
    """Return the roles at the input of a row-parallel linear layer, Megatron's own or Transformer Engine's.

    Tensor parallelism splits the channels, unless the layer takes its whole input and splits it inside.

    Raises:
        LayoutError: the layer is split otherwise.
    """
    tp = groups.axis("tp")
    local = int(linear.weight.shape[1])  # type: ignore[index]
    if getattr(linear, "parallel_mode", "row") != "row":
        raise LayoutError(f"{type(linear).__name__} is parallel by '{linear.parallel_mode}', expected 'row'.")
    total = int(getattr(linear, "input_size", local * tp.size))
    if total != local * tp.size:
        raise LayoutError(
            f"{type(linear).__name__} has input size {total}, but its weight has {local} columns on each of "
            f"{tp.size} tensor-parallel ranks."
        )
    if getattr(linear, "input_is_parallel", True):
        return Placement(Shard(tp.rank * local, local, total), ((tp, Role.SHARD), *_data_roles(groups)))
    return Placement.whole(total, ((tp, Role.SAME), *_data_roles(groups)))


def place_hidden_states(num_channels: int, sequence_parallel: bool, groups: DenseGroups) -> Placement:
    """Return the roles at a norm's output, or at the input and output of a layer."""
    tp_role = Role.SUM_SEQUENCE if sequence_parallel else Role.SAME
    return Placement.whole(num_channels, ((groups.axis("tp"), tp_role), *_data_roles(groups)))


def _data_roles(groups: DenseGroups) -> tuple[tuple[Axis, Role], ...]:
    return (
        (groups.axis("cp"), Role.SUM_SEQUENCE),
        (groups.axis("dp"), Role.SUM),
        (groups.axis("pp"), Role.OWN),
    )
