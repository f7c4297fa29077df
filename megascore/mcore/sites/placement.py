"""The roles of Megatron's parallel axes at the modules where scores are taken."""

from __future__ import annotations

from torch import Tensor, nn

from megascore.errors import LayoutError
from megascore.mcore.world.groups import DenseGroups
from megascore.parallel.axes import Axis, Placement, Role, Shard

__all__ = ["own_columns", "place_hidden_states", "place_kv_heads", "place_row_parallel_input"]


def place_row_parallel_input(linear: nn.Module, groups: DenseGroups, *, communicates: bool = True) -> Placement:
    """Return the roles at the input of a row-parallel linear layer, Megatron's own or Transformer Engine's.

    Tensor parallelism splits the channels. A layer with ``input_is_parallel=False`` is given all of them and splits
    them inside; there too each rank counts for those that its weight has. An ordinary linear layer is replicated.

    Args:
        linear: The layer.
        groups: Groups of the dense layers.
        communicates: False where the layer leaves communication to others, as in shared experts that overlap with the
            token dispatcher. Transformer Engine's layers then no longer say how they are parallel.

    Raises:
        LayoutError: the layer is split otherwise.
    """
    tp = groups.axis("tp")
    local = int(linear.weight.shape[1])  # type: ignore[index]
    if communicates and getattr(linear, "parallel_mode", "row") != "row":
        raise LayoutError(f"{type(linear).__name__} is parallel by '{linear.parallel_mode}', expected 'row'.")
    if not hasattr(linear, "input_is_parallel") and not hasattr(linear, "parallel_mode"):
        return Placement.whole(local, ((tp, Role.SAME), *_data_roles(groups)))
    total = int(getattr(linear, "input_size", local * tp.size))
    if total != local * tp.size:
        raise LayoutError(
            f"{type(linear).__name__} has input size {total}, but its weight has {local} columns on each of "
            f"{tp.size} tensor-parallel ranks."
        )
    return Placement(Shard(tp.rank * local, local, total), ((tp, Role.SHARD), *_data_roles(groups)))


def place_hidden_states(num_channels: int, sequence_parallel: bool, groups: DenseGroups) -> Placement:
    """Return the roles at a norm's output, or at the input and output of a layer."""
    tp_role = Role.SUM_SEQUENCE if sequence_parallel else Role.SAME
    return Placement.whole(num_channels, ((groups.axis("tp"), tp_role), *_data_roles(groups)))


def place_kv_heads(num_kv_heads: int, groups: DenseGroups) -> Placement:
    """Return the roles at the attention output projection where its channels are the KV heads.

    With fewer KV heads than tensor-parallel ranks, several ranks hold query heads of one KV head, and all of them know
    its score: the axis is then two, over the heads and over the ranks of one head.

    Raises:
        LayoutError: neither number divides the other.
    """
    tp = groups.axis("tp")
    if num_kv_heads % tp.size == 0:
        length = num_kv_heads // tp.size
        roles = ((tp, Role.SHARD), *_data_roles(groups))
        return Placement(Shard(tp.rank * length, length, num_kv_heads), roles)
    if tp.size % num_kv_heads:
        raise LayoutError(f"{num_kv_heads} KV heads and {tp.size} tensor-parallel ranks: one must divide the other.")
    ranks_of_head = tp.size // num_kv_heads
    head, rank_of_head = divmod(tp.rank, ranks_of_head)
    heads, ranks = Axis("tp", head, num_kv_heads), Axis("tp of a head", rank_of_head, ranks_of_head)
    return Placement(Shard(head, 1, num_kv_heads), ((heads, Role.SHARD), (ranks, Role.SAME), *_data_roles(groups)))


def _data_roles(groups: DenseGroups) -> tuple[tuple[Axis, Role], ...]:
    return (
        (groups.axis("cp"), Role.SUM_SEQUENCE),
        (groups.axis("dp"), Role.SUM),
        (groups.axis("pp"), Role.OWN),
    )


def own_columns(values: Tensor, shard: Shard) -> Tensor:
    """Return this rank's columns of values [..., columns]: a view where they have all, else the values as they are."""
    return values if values.shape[-1] == shard.length else values.narrow(-1, shard.offset, shard.length)
