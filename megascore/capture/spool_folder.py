"""A folder for the files of one process: locked while the process lives, and removed later where it was killed."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from megascore.files.locks import NoLocks, Owner, owner_of, take_lock

__all__ = ["SpoolFolder"]

logger = logging.getLogger(__name__)

PREFIX = "megascore-spool-"
LOCK_NAME = "lock"
NUM_TRIES = 10
QUIET_SECONDS = 24 * 3600.0
"""How long a folder of another machine has to be untouched: not every storage shows its locks to all machines."""


class SpoolFolder:
    """A new folder inside ``parent``, gone after `close` or with this object.

    The process holds a lock (flock) on a file in it, which the system takes back however the process ends. Making one
    removes those of this user beside it whose lock nobody holds, and logs it: their processes were killed.
    """

    def __init__(self, parent: Path) -> None:
        """Remove what dead processes left behind, then make the folder and take its lock. Not collective.

        Args:
            parent: Made if missing. Several processes may share it, also on several machines.

        Raises:
            OSError: the system refuses.
        """
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(parent)
        for _ in range(NUM_TRIES):
            claimed = _claim(parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
            if claimed is not None:
                break
        else:
            raise OSError(f"{NUM_TRIES} new folders were taken away at once")
        self.path, lock = claimed
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove the folder with all that is in it. Can be repeated."""
        self._remove()


def _claim(path: Path) -> tuple[Path, IO[bytes] | None] | None:
    """Make a folder and return it with its lock; None where a process that tidies up has taken it away.

    The lock is None on storage without locks. There is no lock file then, without which nobody removes a folder.
    """
    path.mkdir()
    try:
        return path, take_lock(path / LOCK_NAME, mode=0o600)
    except NoLocks as error:
        logger.info("%s has no locks (%s): if this process is killed, its folder stays there", path.parent, error)
        (path / LOCK_NAME).unlink()
        return path, None
    except (BlockingIOError, FileNotFoundError):
        _remove(path, None)
        return None
    except OSError:
        _remove(path, None)
        raise


def _remove_left_behind(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                _remove_if_left_behind(path, status.st_mtime)


def _remove_if_left_behind(path: Path, changed: float) -> None:
    """Remove a folder whose owner is dead; an OSError says that it stays.

    Args:
        path: The folder.
        changed: When a file last appeared in it or went, in seconds since 1970.
    """
    try:
        lock = take_lock(path / LOCK_NAME, is_own=False)
    except FileNotFoundError:
        # Its process was killed before it made the lock, or storage has none: a folder goes only if it is empty.
        path.rmdir()
        return
    with lock:
        owner = owner_of(path / LOCK_NAME)
        # An owner that has not said who it is may be on another machine.
        is_here = owner is not None and owner.kernel == Owner.here().kernel
        if is_here or time.time() - changed > QUIET_SECONDS:
            num_bytes = sum(file.lstat().st_size for file in path.rglob("*"))
            _remove(path, lock)
            size, who = num_bytes / 1e6, owner or "a process"
            logger.warning("removed %s (%.1f MB), which %s left behind when it was killed", path, size, who)


def _remove(path: Path, lock: IO[bytes] | None) -> None:
    """Remove a folder, its lock last: a process that is killed meanwhile leaves a folder that can still be removed."""
    with suppress(OSError):
        for inner in path.iterdir():
            if inner.name == LOCK_NAME:
                continue
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            else:
                inner.unlink(missing_ok=True)
        (path / LOCK_NAME).unlink(missing_ok=True)
    # Before the folder: over NFS a file that is open stays in it under another name.
    if lock is not None:
        lock.close()
    with suppress(OSError):
        path.rmdir()
