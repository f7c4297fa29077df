"""A meeting in a store that holds what earlier starts of the same run have left."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from megascore.errors import RankFailure
from megascore.parallel.rendezvous import fresh_store

pytestmark = pytest.mark.fast

TIMEOUT = timedelta(seconds=20)


def meet(store: Store, ranks: list[int], world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(lambda rank: fresh_store(store, rank, world_size, TIMEOUT), ranks))


def test_each_start_has_a_room_of_its_own() -> None:
    store = HashStore()
    for start in range(5):
        rooms = meet(store, [0, 1, 2], 3)
        assert not any(room.check(["address"]) for room in rooms), "nothing of an earlier start is seen"
        rooms[0].set("address", f"start {start}")
        assert [room.get("address") for room in rooms] == [f"start {start}".encode()] * 3


def test_a_rank_that_comes_before_the_first_waits_for_the_new_room() -> None:
    store = HashStore()
    meet(store, [0, 1], 2)
    early: list[Store] = []
    thread = threading.Thread(target=lambda: early.append(fresh_store(store, 1, 2, TIMEOUT)))
    thread.start()
    thread.join(0.2)
    assert not early, "the room of the start before is not for this rank"
    first = fresh_store(store, 0, 2, TIMEOUT)
    thread.join()
    first.set("address", "here")
    assert early[0].get("address") == b"here"


def test_a_start_that_was_cut_short_leaves_nothing_that_harms() -> None:
    store = HashStore()
    with pytest.raises(RankFailure, match="rank 1 did not join"):
        fresh_store(store, 0, 2, timedelta(seconds=0.1))
    rooms = meet(store, [1, 0], 2)
    rooms[0].set("address", "here")
    assert rooms[1].get("address") == b"here"


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 0 did not join"):
        fresh_store(HashStore(), 1, 2, timedelta(seconds=0.1))
