"""The launcher of this process, torchrun or Slurm: its name, whether it started the process again, an end with it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from megascore.process.failures import OTHER_RANK_FAILED

__all__ = ["ending_with_launcher", "is_restart", "launch_name"]

_POLL_SECONDS = 0.5
_LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by torchrun in its workers."""


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """End this process at once when the torchrun that started it has died, for as long as the context lasts.

    Nobody would restart or stop it any more, and it would be in a new start's way. It ends as if it had been killed
    too: what is saved stays, and the same command goes on from there. Does nothing in a process that torchrun did not
    start.
    """
    if _LAUNCHER_VARIABLE not in os.environ:
        yield
        return
    done = threading.Event()
    # A process whose parent dies gets another one.
    threading.Thread(target=_watch, args=(os.getppid(), done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def launch_name() -> str:
    """Return a name that tells this launch of the program from others, the same after a restart by torchrun's agent."""
    if _LAUNCHER_VARIABLE not in os.environ:
        return uuid.uuid4().hex
    return f"process {os.getppid()} on {socket.gethostname()}"


def is_restart() -> bool:
    """Return whether torchrun has restarted the ranks, or Slurm has requeued the job."""
    counts = (os.environ.get(name) or "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count != "0" for count in counts)


def _watch(launcher: int, done: threading.Event) -> None:
    while not done.wait(_POLL_SECONDS):
        if os.getppid() != launcher:
            sys.stderr.write(f"megascore: rank {os.environ.get('RANK', '0')} stopped: torchrun is gone\n")
            sys.stderr.flush()
            # No cleaning up: other ranks, which a clean end would wait for, end in the same way.
            os._exit(OTHER_RANK_FAILED)
