"""``progress.json``: what an outside watcher reads to know how far a run is, without touching it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from megascore.errors import CheckpointError
from megascore.files.whole import write_whole
from megascore.resume.folder import PROGRESS_NAME, is_in_use

__all__ = ["PROGRESS_NAME", "RunState", "StatusFile", "read_status"]

_WRITE_SECONDS = 1.0
"""Least time between two writes in one state."""


class RunState(Enum):
    """What a run is doing, or how it ended."""

    RUNNING = "running"
    STOPPED = "stopped"
    """By a signal, everything saved: the same command goes on."""
    INTERRUPTED = "interrupted"
    """It ended without a word, or because of another rank: the same command goes on from the last checkpoint."""
    FAILED = "failed"
    """By an error that its text explains: that has to be mended first."""
    FINISHED = "finished"


class StatusFile:
    """Writes ``progress.json`` of one run; one process has one."""

    def __init__(self, folder: Path, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: The checkpoint folder.
            total_steps: Steps of the whole run.
            facts: JSON-able entries that do not change, such as the layout and the output.
        """
        self._path = folder / PROGRESS_NAME
        self._content: dict[str, Any] = {
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
            **facts,
        }
        self._written = float("-inf")

    def update(self, entries: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace entries, and write the file unless that was done a moment ago.

        Args:
            entries: By name; JSON-able.
            now: Write in any case.

        Raises:
            OSError: the system refuses.
        """
        self._content.update(entries)
        if now or time.monotonic() - self._written >= _WRITE_SECONDS:
            self._content["updated"] = _now()
            content = json.dumps(self._content, indent=1).encode()
            # A run should not wait for a disk at every step, only where the state changes or a checkpoint was made.
            write_whole(self._path, content, make_folder=False, sync=now)
            self._written = time.monotonic()


def read_status(folder: str | Path) -> dict[str, Any]:
    """Return what ``progress.json`` says, with ``state`` as it really is: a run that is gone is not running.

    Raises:
        CheckpointError: there is no such file, or it is not a run's.
    """
    path = Path(folder) / PROGRESS_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
