"""The worker pool itself. Tier: gloo processes."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankErrors, WorkerPool


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return os.getpid(), total


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one does not like this")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def test_worlds_of_several_sizes_share_their_processes(world: WorkerPool) -> None:
    pairs = world.run(2, sum_of_ranks, 10)
    alone = world.run(1, sum_of_ranks, 5)
    assert [int(total) for _, total in pairs] == [21, 21]
    assert [int(total) for _, total in alone] == [5]
    assert alone[0][0] == pairs[0][0] != os.getpid()


def test_a_failing_rank_is_named_with_its_error_and_the_pool_goes_on(world: WorkerPool) -> None:
    with pytest.raises(RankErrors, match=r"rank 1: ValueError: rank one does not like this(?s:.)*fail_on_rank_one"):
        world.run(2, fail_on_rank_one)
    assert int(world.run(2, sum_of_ranks, 0)[0][1]) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [(hang_on_rank_one, r"ranks \[1\] did not answer in time"), (die_on_rank_one, "rank 1: its process died")],
)
def test_a_lost_rank_is_an_error_and_is_replaced(function: object, message: str) -> None:
    pool = WorkerPool()
    try:
        pool.run(2, sum_of_ranks, 0)
        with pytest.raises(RankErrors, match=message):
            pool.run(2, function, timeout=2.0)  # type: ignore[arg-type]
        assert int(pool.run(2, sum_of_ranks, 0)[0][1]) == 1
    finally:
        pool.close()
