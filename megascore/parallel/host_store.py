"""The store that torchrun's variables name, reached without waiting inside torch, where no signal handler runs."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from megascore.parallel.patience import Patience

__all__ = ["connect", "noting_interrupts"]

_PROBE_SECONDS = 1.0


def connect(rank: int, world_size: int, timeout: timedelta, stop: Callable[[], signal.Signals | None]) -> Store:
    """Return the store at ``MASTER_ADDR``, which rank 0 makes unless torchrun's agent has. Waits for no rank but 0.

    Args:
        rank: This process's number.
        world_size: Number of processes.
        timeout: How long to wait for the store; later, how long its own calls take at most.
        stop: Returns the signal that asked this process to stop, if one did.

    Raises:
        RankFailure: no answer in time.
        Preempted: a signal came first.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    is_host = rank == 0 and not has_agent
    patience = Patience(timeout, stop)
    while not is_host and not _answers(host, port):
        who = "torchrun's store" if has_agent else "rank 0"
        ended = patience.end(f"{who} (no answer from {host}:{port})")
        if ended is not None:
            raise ended
        patience.pause()
    # As torch.distributed's own "env://", but for the waiting.
    return TCPStore(
        host,
        port,
        world_size,
        is_host,
        timeout,
        wait_for_workers=False,
        multi_tenant=not has_agent,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _PROBE_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def noting_interrupts(
    stop: Callable[[], signal.Signals | None],
) -> Iterator[Callable[[], signal.Signals | None]]:
    """Give ``stop`` with SIGINT added, which is noted during the context instead of raised.

    Raises:
        KeyboardInterrupt: at the end, if SIGINT came and nothing else was raised.
    """
    noted: list[signal.Signals] = []
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, lambda *_: noted.append(signal.SIGINT))
    try:
        yield lambda: stop() or (noted[0] if noted else None)
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:
        raise KeyboardInterrupt
