"""Placement is pure: all ranks of a world are made here in one process, and their contributions added by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from megascore.errors import LayoutError
from megascore.hooks.statistics import Merge, Statistic
from megascore.parallel.axes import Axis, Placement, Role, Shard, describe, in_own_dtype

pytestmark = pytest.mark.fast

NUM_CHANNELS = 12
STATISTICS = {
    "channel sums": Statistic("s", (NUM_CHANNELS,), channel_dim=0),
    "sums by channel in the second dimension": Statistic("s", (3, NUM_CHANNELS), channel_dim=1),
    "squares of samples": Statistic("s", (NUM_CHANNELS,), channel_dim=0, of_samples=True),
    "token count": Statistic("s", (), torch.int64),
    "call count": Statistic("s", (), torch.int64, of_samples=True),
    "weight norms": Statistic("s", (NUM_CHANNELS,), channel_dim=0, merge=Merge.REPLICATED),
    "agreed decision": Statistic("s", (4,), torch.int64, merge=Merge.REPLICATED),
}
ROLES = {
    "row-parallel input": {"tp": Role.SHARD, "cp": Role.SUM_SEQUENCE, "dp": Role.SUM},
    "norm output": {"tp": Role.SAME, "cp": Role.SUM_SEQUENCE, "dp": Role.SUM},
    "norm output with sequence parallel": {"tp": Role.SUM_SEQUENCE, "cp": Role.SUM_SEQUENCE, "dp": Role.SUM},
}
SIZES = {"tp": 3, "cp": 2, "dp": 2}


def placements(roles: dict[str, Role]) -> list[Placement]:
    """One placement for each rank of the world."""
    world = []
    for ranks in itertools.product(*(range(size) for size in SIZES.values())):
        position = dict(zip(SIZES, ranks, strict=True))
        axes = tuple((Axis(name, position[name], SIZES[name]), role) for name, role in roles.items())
        length = NUM_CHANNELS // SIZES["tp"]
        sharded = Shard(position["tp"] * length, length, NUM_CHANNELS)
        whole = Shard(0, NUM_CHANNELS, NUM_CHANNELS)
        world.append(Placement(sharded if Role.SHARD in roles.values() else whole, axes))
    return world


def merged(world: list[Placement], statistic: Statistic, local: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([p.contribution(statistic, part) for p, part in zip(world, local, strict=True)]).sum(0)


@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_what_ranks_load_from_a_merged_statistic_merges_to_it_again(
    statistic: Statistic, roles: dict[str, Role]
) -> None:
    world = placements(roles)
    saved = torch.arange(1, torch.Size(statistic.shape).numel() + 1).view(statistic.shape).to(statistic.dtype)
    local = [placement.local_part(statistic, saved) for placement in world]
    assert all(part.dtype == statistic.dtype for part in local)
    torch.testing.assert_close(merged(world, statistic, local), saved.double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("roles", "statistic", "expected"),
    [
        # 2 data-parallel x 2 context-parallel ranks see other tokens; 3 tensor-parallel ranks see the same.
        ("row-parallel input", "channel sums", 4),
        ("norm output", "channel sums", 4),
        ("norm output with sequence parallel", "channel sums", 12),
        # Parts of samples were added before: only data parallelism adds.
        ("row-parallel input", "squares of samples", 2),
        ("norm output with sequence parallel", "squares of samples", 2),
        ("norm output with sequence parallel", "call count", 2),
        ("norm output", "token count", 4),
        ("norm output with sequence parallel", "token count", 12),
        ("norm output with sequence parallel", "weight norms", 1),
        ("row-parallel input", "agreed decision", 1),
    ],
)
def test_each_axis_counts_as_its_role_says(roles: str, statistic: str, expected: int) -> None:
    world = placements(ROLES[roles])
    declared = STATISTICS[statistic]
    ones = [torch.ones_like(p.local_view(declared, torch.zeros(declared.shape))) for p in world]
    assert merged(world, declared, ones).unique().tolist() == [expected]


def test_channels_land_at_their_global_position() -> None:
    world = placements(ROLES["row-parallel input"])
    statistic = STATISTICS["weight norms"]
    local = [torch.arange(p.shard.offset, p.shard.offset + p.shard.length).double() for p in world]
    assert merged(world, statistic, local).tolist() == list(range(NUM_CHANNELS))


def test_uneven_shards_merge_too() -> None:
    statistic = Statistic("s", (5,), channel_dim=0)
    world = [
        Placement(Shard(offset, length, 5), ((Axis("tp", rank, 2), Role.SHARD),))
        for rank, (offset, length) in enumerate([(0, 3), (3, 2)])
    ]
    local = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])]
    assert merged(world, statistic, local).tolist() == [1, 2, 3, 4, 5]


def test_contributing_does_not_change_the_accumulator() -> None:
    statistic, placement = STATISTICS["channel sums"], Placement.whole(NUM_CHANNELS)
    local = torch.ones(NUM_CHANNELS, dtype=torch.float64)
    placement.contribution(statistic, local).add_(1)
    assert local.tolist() == [1.0] * NUM_CHANNELS


def test_an_axis_with_two_roles_is_refused() -> None:
    axis = Axis("tp", 0, 2)
    with pytest.raises(LayoutError, match="an axis has two roles at one place: tp, tp"):
        Placement.whole(4, ((axis, Role.SUM), (axis, Role.SAME)))


def test_split_channels_without_an_axis_that_splits_them_are_refused() -> None:
    with pytest.raises(LayoutError, match="2 of 4 channels, but no axis splits channels"):
        Placement(Shard(0, 2, 4), ((Axis("tp", 0, 2), Role.SAME),))


def test_a_shard_outside_the_channels_is_refused() -> None:
    with pytest.raises(LayoutError, match="channels 3 to 5 do not lie in 0 to 4"):
        Shard(3, 2, 4)


def test_roles_are_described_in_one_line() -> None:
    roles = ((Axis("tp", 0, 2), Role.SHARD), (Axis("cp", 0, 1), Role.SUM_SEQUENCE), (Axis("dp", 0, 2), Role.SUM))
    assert describe(Placement(Shard(0, 1, 2), roles)) == "tp=shard dp=sum"
    assert describe(Placement.whole(3)) == "-"


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_what_ranks_load_where_each_token_comes_several_times_merges_to_it_again(
    statistic: Statistic, copies: int
) -> None:
    world = [Placement(p.shard, p.roles, copies) for p in placements(ROLES["row-parallel input"])]
    saved = torch.arange(1, torch.Size(statistic.shape).numel() + 1).view(statistic.shape).to(statistic.dtype)
    local = [placement.local_part(statistic, saved) for placement in world]
    result = in_own_dtype(statistic, merged(world, statistic, local))
    torch.testing.assert_close(result, saved, rtol=1e-15, atol=0)


def test_a_token_that_comes_several_times_counts_once() -> None:
    # Tensor-parallel ranks without sequence parallelism hold the same 6 tokens, and all send them to the experts.
    world = [Placement.whole(2, ((Axis("edp", rank, 3), Role.SUM),), copies=3) for rank in range(3)]
    tokens, calls = STATISTICS["token count"], STATISTICS["call count"]
    sums = Statistic("s", (2,), channel_dim=0)
    assert in_own_dtype(tokens, merged(world, tokens, [torch.tensor(6)] * 3)) == 6
    assert merged(world, sums, [torch.tensor([1.0, 2.0])] * 3).tolist() == [1, 2]
    # Calls are counted to tell whether there was one: a third of a call must not become none.
    assert merged(world, calls, [torch.tensor(1), torch.tensor(0), torch.tensor(0)]) == 1
