"""Ranks that end when torchrun is gone: nobody would restart or stop them, and they would be in a new start's way."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megascore.process.failures import OTHER_RANK_FAILED

__all__ = ["ending_with_launcher"]

_POLL_SECONDS = 0.5
_LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by torchrun in its workers."""


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """End this process at once when the torchrun that started it has died, for as long as the context lasts.

    As if it had been killed too: what is saved stays, and the same command goes on from there. Does nothing in a
    process that torchrun did not start.
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


def _watch(launcher: int, done: threading.Event) -> None:
    while not done.wait(_POLL_SECONDS):
        if os.getppid() != launcher:
            sys.stderr.write(f"megascore: rank {os.environ.get('RANK', '0')} stopped: torchrun is gone\n")
            sys.stderr.flush()
            # No cleaning up: other ranks, which a clean end would wait for, end in the same way.
            os._exit(OTHER_RANK_FAILED)
