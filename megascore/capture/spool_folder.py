"""A folder for the files of one process: locked while the process lives, and removed later where it was killed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class _Owner:
    """Whose folder it is, as its lock file says."""

    process: int
    host: str
    kernel: str
    """Of the running system: whoever has the same one is on the same machine."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def _claim(path: Path) -> tuple[Path, int | None] | None:
    """Make a folder and return it with its lock; None where someone who tidies up has been faster.

    The lock is None on storage without locks. There is no lock file then, without which nobody removes a folder.
    """
    path.mkdir()
    lock = None
    try:
        lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), (path / LOCK_NAME).stat()):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        _remove(path, lock)
        return None
    except OSError as error:
        if lock is None:
            raise
        logger.info("%s has no locks (%s): if this process is killed, its folder stays there", path.parent, error)
        os.close(lock)
        (path / LOCK_NAME).unlink()
        return path, None
    try:
        os.write(lock, json.dumps(vars(_Owner(os.getpid(), socket.gethostname(), _kernel()))).encode())
    except OSError:
        _remove(path, lock)
        raise
    return path, lock


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
        # For writing, as locks over NFS need it.
        lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Killed before it had a lock, or made by a version without: only one that is empty goes.
        path.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = _owner(lock)
        here = owner is not None and owner.kernel == _kernel()
        if here or time.time() - changed > QUIET_SECONDS:
            num_bytes = sum(file.lstat().st_size for file in path.rglob("*"))
            lock, held = -1, lock
            _remove(path, held)
            logger.warning(
                "removed %s (%.1f MB), which %s left behind when it was killed",
                path,
                num_bytes / 1e6,
                owner or "a process",
            )
    finally:
        if lock >= 0:
            os.close(lock)


def _owner(lock: int) -> _Owner | None:
    try:
        return _Owner(**json.loads(os.pread(lock, 4096, 0)))
    except (ValueError, TypeError):
        # Killed before it had said who it is.
        return None


def _remove(path: Path, lock: int | None) -> None:
    """Remove a folder, its lock last: killed in the midst of this, it is still one that was left behind."""
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
        os.close(lock)
    with suppress(OSError):
        path.rmdir()


def _kernel() -> str:
    """Return what tells the running system from all others, and from itself before it was started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
