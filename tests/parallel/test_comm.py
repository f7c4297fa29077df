"""The collectives, on real gloo processes: one call of the pool checks several things."""

from __future__ import annotations

import torch

from megascore.errors import DataError, LayoutError, RankFailure
from megascore.hooks.statistics import Statistic
from megascore.parallel.comm import agree, gather_objects, sum_in_place, world_rank, world_size
from megascore.parallel.merge import agree_on_plan
from tests.pool import WorkerPool


def test_collectives_on_three_ranks(world: WorkerPool) -> None:
    ranks = world.run(3, use_all_collectives)
    for rank, seen in enumerate(ranks):
        assert seen["sums"] == ([6.0, 6.0], [[3]])
        assert seen["objects"] == ["from 0", "from 1", "from 2"]
        assert seen["agreed"] == rank
        assert seen["plan"] == ["a", "b0", "b1", "b2"]
    assert [seen["raised"] for seen in ranks] == ["RankFailure", "DataError", "RankFailure"]
    assert [seen["text"] for seen in ranks] == [
        "reading failed on rank 1: no text on 1",
        "no text on 1",
        "reading failed on rank 1: no text on 1",
    ]
    # Rank 2 has another text than the one that is told, so it does not keep quiet; it would with the same one.
    assert [seen["is told"] for seen in ranks] == [False, False, False]
    assert [seen["same is told"] for seen in ranks] == [False, True, True]
    assert all("TypeError: unknown" in seen["unknown"] and "its traceback" in seen["unknown"] for seen in ranks[:2])
    assert all("ranks 0 and 2 differ at a" in seen["plan error"] for seen in ranks)


def use_all_collectives() -> dict[str, object]:
    rank = world_rank()
    seen: dict[str, object] = {}
    float_tensor, count = torch.tensor([1.0, 1.0]) * (rank + 1), torch.tensor([[1]])
    sum_in_place([float_tensor, count])
    seen["sums"] = (float_tensor.tolist(), count.tolist())
    seen["objects"] = gather_objects(f"from {rank}")
    seen["agreed"] = agree("nothing", lambda: rank)
    try:
        # Ranks 1 and 2 fail; the first of them tells its own error, the others tell of it.
        agree("reading", _fail_on_ranks_1_and_2)
    except (DataError, RankFailure) as error:
        seen["raised"], seen["text"], seen["is told"] = type(error).__name__, str(error), error.is_told
    try:
        agree("checking", _fail_alike)
    except (DataError, RankFailure) as error:
        seen["same is told"] = error.is_told
    try:
        agree("computing", _fail_unexpectedly_on_rank_2)
    except (TypeError, RankFailure) as error:
        seen["unknown"] = str(error)
    seen["plan"] = list(agree_on_plan({"a": (Statistic("s", (2,)),), f"b{rank}": ()}))
    try:
        agree_on_plan({"a": (Statistic("s", (3 if rank == 2 else 2,)),)})
    except LayoutError as error:
        seen["plan error"] = str(error)
    return seen


def test_without_torch_distributed_one_process_is_a_world() -> None:
    tensor = torch.tensor([1.0])
    sum_in_place([tensor])
    assert (world_rank(), world_size(), tensor.tolist(), gather_objects("x")) == (0, 1, [1.0], ["x"])


def _fail_on_ranks_1_and_2() -> None:
    if world_rank() > 0:
        raise DataError(f"no text on {world_rank()}")


def _fail_unexpectedly_on_rank_2() -> None:
    if world_rank() == 2:
        raise TypeError("unknown")


def test_every_rank_gets_the_tensor_of_rank_0_however_it_is_cut(world: WorkerPool) -> None:
    for dtype in (torch.int64, torch.uint8):
        expected = torch.arange(105).view(15, 7).t().to(dtype)
        for received in world.run(2, broadcast_in_small_pieces, expected):
            assert received.dtype == dtype
            assert torch.equal(received, expected)


def broadcast_in_small_pieces(whole: torch.Tensor) -> torch.Tensor:
    from megascore.parallel import comm

    comm.PIECE_BYTES = 100
    try:
        return comm.broadcast_tensor(whole if comm.world_rank() == 0 else None)
    finally:
        comm.PIECE_BYTES = 1 << 26


def _fail_alike() -> None:
    raise DataError("the same everywhere")
