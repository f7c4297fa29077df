"""An end to the waiting for other ranks: by time, or by a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import timedelta

from megascore.errors import Preempted, RankFailure

__all__ = ["Patience"]

_POLL_SECONDS = 0.02


class Patience:
    """How long a rank goes on waiting for others. It sleeps in Python, so that signal handlers run."""

    def __init__(self, timeout: timedelta, stop: Callable[[], signal.Signals | None]) -> None:
        """Begin to wait.

        Args:
            timeout: How long at most.
            stop: Returns the signal that asked this process to stop, if one did.
        """
        self.stop: signal.Signals | None = None
        """The signal that ended the waiting, once `end` or another rank has seen one."""
        self._stop, self._timeout = stop, timeout
        self.renew()

    def renew(self) -> None:
        """Begin the time again."""
        self._deadline = time.monotonic() + self._timeout.total_seconds()

    def end(self, missing: str) -> Preempted | RankFailure | None:
        """Return the error with which the waiting ends now; None while it goes on.

        Args:
            missing: Who has not come, for the error: "ranks 1, 3".
        """
        self.stop = self.stop or self._stop()
        if self.stop is not None:
            stopped = Preempted(
                f"stopped by {self.stop.name} while waiting for {missing} to join, before anything was done; "
                "the same command begins again."
            )
            stopped.is_of_one_rank = True
            return stopped
        if time.monotonic() > self._deadline:
            waited = f"{self._timeout.total_seconds():g} s (run.timeout_minutes)"
            return RankFailure(
                f"{missing} did not join the run in time, within {waited}: read the output there, or of the machine."
            )
        return None

    def pause(self) -> None:
        """Sleep until it is time to look again."""
        time.sleep(_POLL_SECONDS)
