"""Work that may hang in the system, such as a write to storage that is gone, with an end to the waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["within"]

Result = TypeVar("Result")


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the function's result, or stop waiting for it.

    It runs in a thread that can't be stopped: after the time is up it may still come to its end. So it must be work
    that does no harm when it is done late.

    Raises:
        TimeoutError: it took longer.
        Exception: the function's own error.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:  # Raised again in the thread that waits.
            outcome.set_exception(error)

    # A daemon, for a thread that hangs in the system must not keep the process alive.
    threading.Thread(target=work, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(None, f"the storage did not answer within {seconds:g} s")
    return outcome.result()
