"""Failures on their way out of this process: one readable message, for people and for torchrun's summary."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megascore.errors import MegascoreError, Preempted, RankFailure

__all__ = ["OTHER_RANK_FAILED", "STOPPED", "USER_ERROR", "first_error", "is_lost_contact", "run_and_report"]

USER_ERROR = 2
OTHER_RANK_FAILED = 3
STOPPED = 75
"""By a signal, everything saved. The number is EX_TEMPFAIL of sysexits.h: try again later."""

_GRACE_SECONDS = 3.0
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# What gloo, NCCL and the store say, in plain RuntimeErrors, when another rank is gone.
_LOST_CONTACT_TEXTS = (
    "broken pipe",
    "communicator was aborted",
    "connection closed by peer",
    "connection refused",
    "connection reset by peer",
    "connection was likely closed",
    "failed to recv",
    "ncclremoteerror",
    "pair closure",
    "remote process exited",
    "socket closed",
    "socket timeout",
    "timed out waiting",
    "wait timeout",
)


def run_and_report(function: Callable[[], int], console: Console) -> int:
    """Run a command, and turn an error that explains itself into a message and an exit code.

    Under torchrun the error is also recorded for its summary: with the traceback only where megascore doesn't know
    it. The rank whose error only follows from another's waits a moment first, since torchrun takes the first failure
    for the root cause and stops the others itself.

    Returns:
        The function's exit code, `USER_ERROR`, `OTHER_RANK_FAILED` or `STOPPED`. Errors that megascore doesn't know
        come through.
    """

    def guarded() -> int:
        try:
            return function()
        except Exception as error:
            code = _explain(error, console)
            if code is None:
                raise
            return code

    if _ERROR_FILE not in os.environ:
        return guarded()
    # Imported here: only torchrun's workers need it, and it takes a while.
    from torch.distributed.elastic.multiprocessing.errors import record

    code = record(guarded)()
    return 0 if code is None else code


def first_error(error: BaseException) -> BaseException:
    """Return what came first: an error while cleaning up after another one hides that one in its context."""
    seen = {id(error)}
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None or id(earlier) in seen:
            return error
        seen.add(id(earlier))
        error = earlier


def is_lost_contact(error: BaseException) -> bool:
    """Return whether an error is what a rank sees when another one is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _LOST_CONTACT_TEXTS)


def _explain(error: Exception, console: Console) -> int | None:
    first = first_error(error)
    known = error if isinstance(error, MegascoreError) else first
    in_world = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if os.environ.get("MEGASCORE_DEBUG") == "1":
        _say(console, "".join(traceback.format_exception(error)))
    if isinstance(known, Preempted):
        if not known.is_told and (_rank() == "0" or known.is_of_one_rank):
            _say(console, f"megascore: {known}")
        _write_error_file(f"megascore: {known}")
        return STOPPED
    if isinstance(known, RankFailure):
        text = f"megascore: rank {_rank()} stopped: {_first_line(known)}"
        code = _stop_after_others(text, None if known.is_told else console)
        return USER_ERROR if known.is_own else code
    if in_world and is_lost_contact(first) and not isinstance(error, MegascoreError):
        text = "lost contact with another rank; its own error is the one to read"
        return _stop_after_others(f"megascore: rank {_rank()} stopped: {text} ({_first_line(first)})", console)
    if isinstance(known, MegascoreError):
        text = f"megascore: error: {f'rank {_rank()}: ' if in_world else ''}{known}"
        _say(console, text)
        _write_error_file(text)
        return USER_ERROR
    return None


def _stop_after_others(text: str, console: Console | None) -> int:
    if console is not None:
        _say(console, text)
    if _ERROR_FILE in os.environ:
        time.sleep(_GRACE_SECONDS)
    _write_error_file(text)
    return OTHER_RANK_FAILED


def _write_error_file(text: str) -> None:
    """Tell torchrun's summary, in the form that its own error handler writes; whole, as it may be read at any time."""
    path = os.environ.get(_ERROR_FILE)
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = json.dumps({"message": {"message": text, "extraInfo": extra}})
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        # The message is on the console already; its copy for the summary must not hide it.
        temporary.unlink(missing_ok=True)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rank() -> str:
    return os.environ.get("RANK", "0")
