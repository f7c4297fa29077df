"""Locks on files (flock): the system takes one back however its holder ends, and the file says who that is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from megascore.files.json_text import parse_json

__all__ = ["NoLocks", "Owner", "is_locked", "owner_of", "take_lock"]


class NoLocks(OSError):  # noqa: N818 - it names what the storage lacks
    """The storage keeps no locks."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock, or held it last."""

    process: int
    host: str
    kernel: str
    """Name of the running system: whoever has the same one is on the same machine, not started again since."""

    @classmethod
    def here(cls) -> Owner:
        """Return this process."""
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            kernel = socket.gethostname()
        return cls(os.getpid(), socket.gethostname(), kernel)

    def __str__(self) -> str:
        """Return who it is, for people."""
        return f"process {self.process} on {self.host}"


def take_lock(path: Path, *, is_own: bool = True, seconds: float = 0.0, mode: int = 0o666) -> IO[bytes]:
    """Open a file and lock it, until it is closed or the process ends. The file itself stays.

    Args:
        path: The file; a link is refused.
        is_own: Make the file if it is missing, and write into it whose lock it is. Otherwise it is left as it is.
        seconds: How long to wait for another process that holds the lock.
        mode: Permissions of a new file, less the process's umask.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: there is no such file, or it was removed meanwhile.
        NoLocks: the storage keeps no locks.
        OSError: the system refuses for another reason.
    """
    # For writing, as locks over NFS need it.
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if is_own else 0)
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        file = stack.enter_context(open(os.open(path, flags, mode), "r+b", buffering=0))
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
            except OSError as error:
                raise NoLocks(*error.args) from error
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(2, "the lock file was replaced", str(path))
        if is_own:
            file.truncate(0)
            os.write(file.fileno(), json.dumps(asdict(Owner.here())).encode())
        stack.pop_all()
        return file


def owner_of(path: Path) -> Owner | None:
    """Return whose lock a file is or was last; None where it says nothing that can be read."""
    try:
        return Owner(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; changes nothing.

    Raises:
        OSError: the file is there and can't be read, or the storage keeps no locks.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
