"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from megascore.errors import ScoreFileError

__all__ = ["check_output_path", "write_whole"]


def check_output_path(path: str | Path, overwrite: bool) -> None:
    """Check, before a long run, that a file can be written at its end; leaves nothing behind.

    Really creates and removes a file, in the folder of `path` or, where that is still to be made, in the nearest one
    above it.

    Raises:
        ScoreFileError: a file is there and `overwrite` is false, or nothing can be written there.
    """
    target = Path(path)
    _refuse_existing(target, overwrite)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = _temporary_name(folder / target.name)
    try:
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        probe_text = f"no file can be made in {folder} ({error.strerror or error})"
        raise ScoreFileError(
            f"can't write {target}: {probe_text}. Choose another path, or make the folder writable."
        ) from error


def write_whole(path: str | Path, content: bytes, overwrite: bool) -> None:
    """Write under a temporary name in the same folder, sync, and rename; a failure leaves the old state and no rest.

    Raises:
        ScoreFileError: a file is there and `overwrite` is false, or the system refuses.
    """
    target = Path(path)
    _refuse_existing(target, overwrite)
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Again: somebody may have written it during the run.
        _refuse_existing(target, overwrite)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise ScoreFileError(
            f"can't write {target}: {error.strerror or error}. Free the disk or choose another path."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    try:
        is_folder, exists = target.is_dir(), os.path.lexists(target)
    except OSError as error:
        raise ScoreFileError(f"can't write {target}: {error.strerror or error}. Choose another path.") from error
    if is_folder:
        raise ScoreFileError(f"can't write {target}: it is a folder. Give the path of a file in it.")
    if exists and not overwrite:
        raise ScoreFileError(
            f"{target} exists already: choose another path, or allow replacing it (run.overwrite=true)."
        )


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
