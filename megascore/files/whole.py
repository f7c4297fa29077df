"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["temporary_name", "write_whole"]


def write_whole(
    path: Path,
    content: bytes,
    *,
    before_rename: Callable[[], None] = lambda: None,
    make_folder: bool = True,
    sync: bool = True,
) -> None:
    """Write under a temporary name in the same folder, sync, rename, and sync the folder.

    A failure, also an interrupt, leaves what was there before and no rest.

    Args:
        path: File to write; a file that is there is replaced.
        content: All of it.
        before_rename: Called when everything is on disk under the other name; an error from it leaves no file.
        make_folder: Make the folder if it is missing; else that is an error.
        sync: Wait for the disk. Without, a reader still sees the old or the new file whole, but after the machine
            itself went down it may be an older one, or empty.

    Raises:
        OSError: the system refuses.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        before_rename()
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside ``path`` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
