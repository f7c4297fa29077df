"""The folder of a run's checkpoints, as one process sees it: locking, naming, writing, choosing, dropping.

Only rank 0 has one. Nothing here talks to other ranks.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megascore.errors import CheckpointError
from megascore.files.tensor_file import DamagedFile
from megascore.files.whole import write_whole
from megascore.process.closing import Closing
from megascore.resume.snapshot import Snapshot

__all__ = ["PROGRESS_NAME", "CheckpointFolder", "Found", "is_in_use"]

KEPT = 2
"""Checkpoints that are kept: the newest, and one before it in case the storage damages the newest."""
_NAME = re.compile(r"megascore-step-(\d{8})(?:-block-(\d{4}))?\.safetensors")
LOCK_NAME = "lock"
PROGRESS_NAME = "progress.json"
_AFRESH = "afresh"
"""File that says which launch has dropped all that was here before it."""
_LOCK_SECONDS = 5.0
"""A process that was just killed, or a child of it, may hold its lock for a moment, and so does one that asks."""


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a folder."""

    path: Path
    data: bytes
    snapshot: Snapshot
    skipped: Sequence[str] = ()
    """Newer ones that are damaged, each with the reason."""


class CheckpointFolder(Closing):
    """A locked folder; ``with CheckpointFolder(path) as folder``."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder if it is missing, and take its lock.

        Raises:
            CheckpointError: another run is in it, or the system refuses.
        """
        self.path = Path(path)
        self._good: list[Path] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._identity = self._on_disk()
            self._lock = self._take_lock()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {self.path} can't be used: {error.strerror or error}. Make it a writable folder on "
                "a file system with locks, or choose another one (run.checkpoint_dir)."
            ) from error
        self._remove_rests()

    def close(self) -> None:
        """Release the lock; the system does it for a process that is killed."""
        self._lock.close()

    def newest(self) -> Found | None:
        """Return the newest whole checkpoint; None where there is none at all. Changes nothing.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged, or the newest whole one can't be used.
        """
        skipped: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                data = path.read_bytes()
                snapshot = Snapshot.from_bytes(data)
            except OSError as error:
                skipped.append(f"{path.name} can't be read ({error.strerror or error})")
                continue
            except DamagedFile as error:
                skipped.append(f"{path.name} {error}")
                continue
            except CheckpointError as error:
                raise CheckpointError(f"{path} can't be resumed: {error}.") from error
            return Found(path, data, snapshot, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.path} is whole ({'; '.join(skipped)}). Put a good copy there, or start from "
                "the beginning with run.resume=never, which drops them."
            )
        return None

    def checkpoints(self) -> list[Path]:
        """Return the files named as checkpoints, the oldest first; whole or not."""
        named = [(match, path) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        # By block first: where blocks are scored one at a time, steps start again with each.
        return [path for _, _, path in sorted((int(match[2] or 0), int(match[1]), path) for match, path in named)]

    def trust(self, found: Found) -> None:
        """Say that the run goes on from this checkpoint: it is kept until newer ones are there."""
        self._good = [found.path]

    def write(self, snapshot: Snapshot, data: bytes, *, before_rename: Callable[[], None] = lambda: None) -> Path:
        """Write a checkpoint whole or not at all, then drop those that are not needed any more.

        Raises:
            OSError: the system refuses, or the folder is not the one that was opened.
        """
        path = self.path / _name_of(snapshot)

        def check() -> None:
            before_rename()
            self._require_same_folder()

        self._require_same_folder()
        write_whole(path, data, before_rename=check, make_folder=False)
        earlier = [good for good in self._good if good != path]
        self._good = [*earlier[1 - KEPT :], path]
        for other in self.checkpoints():
            if other not in self._good:
                other.unlink(missing_ok=True)
        return path

    def start_afresh(self, launch: str, *, is_restart: bool) -> list[Path]:
        """Remove what earlier runs left here, once for each launch: its own restarts go on from its own checkpoints.

        Args:
            launch: What tells this launch of the program from others.
            is_restart: Whether the launcher itself has started the ranks again.

        Returns:
            The checkpoints that were removed.
        """
        marker = self.path / _AFRESH
        if marker.is_file() and (is_restart or marker.read_text(encoding="utf-8") == launch):
            return []
        # The marker is there only while everything older is gone.
        marker.unlink(missing_ok=True)
        (self.path / PROGRESS_NAME).unlink(missing_ok=True)
        dropped = self.checkpoints()
        for path in dropped:
            path.unlink(missing_ok=True)
        write_whole(marker, launch.encode(), make_folder=False)
        return dropped

    def last_good(self) -> Path | None:
        """Return the newest checkpoint that this run wrote or went on from."""
        return self._good[-1] if self._good else None

    def _on_disk(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino

    def _require_same_folder(self) -> None:
        # A folder that is made again, or lies under a mount that is gone, has neither this run's lock nor its files.
        if self._on_disk() != self._identity:
            raise FileNotFoundError(2, "the folder was replaced while the run went on", str(self.path))

    def _take_lock(self) -> IO[str]:
        file = (self.path / LOCK_NAME).open("a+", encoding="utf-8")
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                raise CheckpointError(
                    f"another run is using the checkpoint folder {self.path} ({owner}): wait for it, stop it, or give "
                    "this run a folder of its own (run.checkpoint_dir)."
                ) from error
            except OSError:
                file.close()
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file

    def _remove_rests(self) -> None:
        """Remove what killed runs left behind half written; the lock says that nobody is writing."""
        for path in self.path.glob(".*.tmp"):
            with suppress(OSError):
                path.unlink()


def _name_of(snapshot: Snapshot) -> str:
    block = f"-block-{snapshot.cursor['block']:04d}" if "block" in snapshot.cursor else ""
    return f"megascore-step-{snapshot.step:08d}{block}.safetensors"


def is_in_use(path: str | Path) -> bool:
    """Return whether a run holds the lock of a checkpoint folder; changes nothing."""
    try:
        with (Path(path) / LOCK_NAME).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
