"""``progress.json``: the file that tells an outside watcher how far a run is, and how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from megascore.errors import CheckpointError
from megascore.files.json_text import parse_json
from megascore.files.locks import is_locked
from megascore.files.whole import write_whole

__all__ = ["LOCK_NAME", "PROGRESS_NAME", "ProgressFile", "RunState", "is_in_use", "read_status"]

LOCK_NAME = "lock"
PROGRESS_NAME = "progress.json"
_WRITE_SECONDS = 1.0
"""Least time between two writes in one state."""


class RunState(Enum):
    """What a run is doing, or how it ended."""

    RUNNING = "running"
    STOPPED = "stopped"
    """A signal stopped it, and everything is saved: the same command goes on."""
    INTERRUPTED = "interrupted"
    """It ended without a word, or because of another rank: the same command goes on from the last checkpoint."""
    FAILED = "failed"
    """An error ended it, whose cause has to be mended first; the text explains it."""
    FINISHED = "finished"
    """Its result is written."""


class ProgressFile:
    """``progress.json`` of one run, as the process that writes it has it. Its methods raise OSError."""

    def __init__(self, folder: Path, write: Callable[..., None] = write_whole) -> None:
        """Prepare; ``write`` has the arguments of `write_whole`."""
        self._path = folder / PROGRESS_NAME
        self._write = write
        self._content: dict[str, Any] = {}
        self._written = float("-inf")

    def begin(self, total_steps: int, entries: Mapping[str, Any]) -> None:
        """Write the file anew, for a run of so many steps; the entries are JSON-able, as all others."""
        self._content = {
            "state": RunState.RUNNING.value,
            "step": 0,
            "total_steps": total_steps,
            "tokens": 0,
            "tokens_per_second": None,
            "eta_seconds": None,
            "last_checkpoint": None,
            "error": None,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _now(),
        }
        self.note(entries, now=True)

    def note(self, entries: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace entries of a file that was begun; without ``now`` it is written once a second at most."""
        if not self._content:
            return
        self._content.update(entries)
        if now or time.monotonic() - self._written >= _WRITE_SECONDS:
            self._content["updated"] = _now()
            content = json.dumps(self._content, indent=1).encode()
            # A run should not wait for a disk at every step, only where the state changes or a checkpoint was made.
            self._write(self._path, content, make_folder=False, sync=now)
            self._written = time.monotonic()

    def finish(self) -> None:
        """Say that the run is finished, also where an earlier start was killed just before it would."""
        entries = {"state": RunState.FINISHED.value, "error": None, "eta_seconds": 0}
        if self._content:
            self.note(entries, now=True)
        elif not self.says_finished():
            self.begin(0, entries)

    def says_finished(self) -> bool:
        """Return whether the file says that the run is finished."""
        try:
            return bool(read_status(self._path.parent)["state"] == RunState.FINISHED.value)
        except CheckpointError:
            return False


def is_in_use(folder: str | Path) -> bool:
    """Return whether a run holds the lock of a checkpoint folder; changes nothing."""
    return is_locked(Path(folder) / LOCK_NAME)


def read_status(folder: str | Path) -> dict[str, Any]:
    """Return what ``progress.json`` says, with ``state`` as it really is: a run that is gone is not running.

    Raises:
        CheckpointError: there is no such file, or it is not a run's.
    """
    path = Path(folder) / PROGRESS_NAME
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        state = RunState(content["state"])
    except FileNotFoundError as error:
        raise CheckpointError(f"no run has begun in {folder}: it has no {PROGRESS_NAME}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a run's progress file: {error!r}.") from error
    if state is RunState.RUNNING and not is_in_use(folder):
        content["state"] = RunState.INTERRUPTED.value
    assert isinstance(content, dict)
    return content


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
