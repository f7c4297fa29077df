"""A meeting in a store that outlives the processes: torchrun keeps one store over its restarts of the ranks.

What the ranks before a restart left there, such as addresses at which nobody listens any more, would be taken for that
of the new ones. (torch 2.13's own comment says that each try gets a new store; since agents share theirs, it doesn't.)
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megascore.errors import RankFailure

__all__ = ["fresh_store", "store_of_environment"]

_LEADER = "megascore/leader"
_POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return a view of ``store`` that only the ranks of this start see. Collective over the ranks, before any group.

    Rank 0 opens a room of a new name; the others knock with a token of their own, and enter when rank 0 has heard all
    and names their tokens. A rank that finds the room of an earlier start is not named there, and looks again.

    Args:
        store: Shared by all ranks.
        rank: This process's number.
        world_size: Number of processes.
        timeout: How long to wait for the others.

    Raises:
        RankFailure: not all ranks came in time.
    """
    token = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        room = uuid.uuid4().hex
        store.set(_LEADER, room)
        tokens = [token]
        for other in range(1, world_size):
            tokens.append(_wait_for(store, _knock(room, other), deadline, other))
        store.set(_guests(room), json.dumps(tokens))
        return PrefixStore(room, store)
    knocked = ""
    while True:
        room = _wait_for(store, _LEADER, deadline, 0)
        if room != knocked:
            store.set(_knock(room, rank), token)
            knocked = room
        if store.check([_guests(room)]) and json.loads(store.get(_guests(room)))[rank : rank + 1] == [token]:
            return PrefixStore(room, store)
        _pause(deadline, 0)


def _wait_for(store: Store, key: str, deadline: float, other: int) -> str:
    while not store.check([key]):
        _pause(deadline, other)
    return bytes(store.get(key)).decode()


def _pause(deadline: float, other: int) -> None:
    if time.monotonic() > deadline:
        raise RankFailure(f"rank {other} did not join the run in time: read its own output, or its machine's.")
    time.sleep(_POLL_SECONDS)


def _knock(room: str, rank: int) -> str:
    return f"megascore/{room}/{rank}"


def _guests(room: str) -> str:
    return f"megascore/{room}/guests"


def store_of_environment(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store that torchrun's variables name, fresh, with this process's number and the number of processes.

    Collective over the ranks that torchrun started.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    return fresh_store(store, rank, world_size, timeout), rank, world_size
