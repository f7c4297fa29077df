"""Work that may hang in the system, such as a write to storage that is gone, with an end to the waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
    results: list[Result] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(function())
        except Exception as error:  # Raised again in the thread that waits.
            errors.append(error)

    # A daemon, for a thread that hangs in the system must not keep the process alive.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(None, f"the storage did not answer within {seconds:g} s")
    return results[0]
