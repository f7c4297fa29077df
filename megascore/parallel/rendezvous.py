"""A meeting in a store that outlives the processes: torchrun keeps one store over its restarts of the ranks.

What the ranks before a restart left there, such as addresses at which nobody listens any more, would be taken for that
of the new ones. (torch 2.13's own comment says that each try gets a new store; since agents share theirs, it doesn't.)

Nothing here waits inside torch, where Python's signal handlers do not run.
"""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megascore.errors import Preempted, RankFailure
from megascore.parallel.host_store import connect, noting_interrupts
from megascore.parallel.patience import Patience

__all__ = ["fresh_store", "store_of_environment"]

_LEADER = "megascore/leader"
# How long a store that is gone with rank 0 stays for the others to read there that rank 0 has given up.
_FAREWELL_SECONDS = 0.5


def store_of_environment(
    timeout: timedelta, stop: Callable[[], signal.Signals | None] = lambda: None
) -> tuple[Store, int, int]:
    """Return the store that torchrun's variables name, fresh, with this process's number and the number of processes.

    Collective over the ranks that torchrun started.

    Args:
        timeout: How long to wait for the others.
        stop: Returns the signal that asked this process to stop, if one did. SIGINT is one in any case.

    Raises:
        RankFailure: not all ranks came in time.
        Preempted: a signal came to one of the ranks before all were there.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with noting_interrupts(stop) as stop_or_interrupt:
        store = connect(rank, world_size, timeout, stop_or_interrupt)
        return fresh_store(store, rank, world_size, timeout, stop_or_interrupt), rank, world_size


def fresh_store(
    store: Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
    stop: Callable[[], signal.Signals | None] = lambda: None,
) -> Store:
    """Return a view of ``store`` that only the ranks of this start see. Collective over the ranks, before any group.

    Rank 0 opens a room of a new name; the others knock with a token of their own, and enter when rank 0 has heard all
    and names their tokens. A rank that finds the room of an earlier start is not named there, and looks again. Rank 0
    says who is missing; a rank that it has answered leaves that to it.

    Args:
        store: Shared by all ranks.
        rank: This process's number.
        world_size: Number of processes.
        timeout: How long to wait for the others.
        stop: Returns the signal that asked this process to stop, if one did.

    Raises:
        RankFailure: not all ranks came in time.
        Preempted: a signal came to one of the ranks before all were there.
    """
    patience, token = Patience(timeout, stop), uuid.uuid4().hex
    if rank == 0:
        room = _lead(store, token, world_size, patience)
    else:
        room = _follow(store, token, rank, patience)
    return PrefixStore(room, store)


def _lead(store: Store, token: str, world_size: int, patience: Patience) -> str:
    room = uuid.uuid4().hex
    store.set(_LEADER, room)
    tokens = {0: token}
    while True:
        for other in range(1, world_size):
            if other not in tokens and store.check([_knock(room, other)]):
                tokens[other] = _read(store, _knock(room, other))
                store.set(_answer(room, other), tokens[other])
        if len(tokens) == world_size:
            store.set(_guests(room), json.dumps([tokens[other] for other in range(world_size)]))
            return room
        if patience.stop is None and store.check([_stopped(room)]):
            patience.stop = signal.Signals(int(_read(store, _stopped(room))))
        ended = patience.end(_ranks([other for other in range(world_size) if other not in tokens]))
        if ended is not None:
            store.set(_given_up(room), str(int(patience.stop or 0)))
            if len(tokens) > 1:
                time.sleep(_FAREWELL_SECONDS)
            raise ended
        patience.pause()


def _follow(store: Store, token: str, rank: int, patience: Patience) -> str:
    room, is_answered = "", False
    while True:
        if store.check([_LEADER]):
            found = _read(store, _LEADER)
            if found != room:
                room, is_answered = found, False
                store.set(_knock(room, rank), token)
            if store.check([_guests(room)]) and json.loads(store.get(_guests(room)))[rank : rank + 1] == [token]:
                return room
            if not is_answered and store.check([_answer(room, rank)]):
                is_answered = _read(store, _answer(room, rank)) == token
                if is_answered:
                    # Rank 0 may have begun to wait later, and says who is missing when its own time is up.
                    patience.renew()
            if is_answered and store.check([_given_up(room)]):
                number = int(_read(store, _given_up(room)))
                raise _silent(
                    Preempted("rank 0 was told to stop") if number else RankFailure("not all ranks joined the run")
                )
        ended = patience.end("rank 0")
        if ended is not None:
            if is_answered and patience.stop is not None:
                store.set(_stopped(room), str(int(patience.stop)))
            # Without rank 0 the first one says it.
            raise _silent(ended) if is_answered or store.add(_told(room), 1) > 1 else ended
        patience.pause()


def _silent(error: Preempted | RankFailure) -> Preempted | RankFailure:
    error.is_told = True
    return error


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _read(store: Store, key: str) -> str:
    return bytes(store.get(key)).decode()


def _knock(room: str, rank: int) -> str:
    return f"megascore/{room}/{rank}"


def _answer(room: str, rank: int) -> str:
    return f"megascore/{room}/answer to {rank}"


def _guests(room: str) -> str:
    return f"megascore/{room}/guests"


def _stopped(room: str) -> str:
    return f"megascore/{room}/stopped"


def _given_up(room: str) -> str:
    return f"megascore/{room}/given up"


def _told(room: str) -> str:
    # The room may be that of an earlier start, or none.
    return f"megascore/{room}/told {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
