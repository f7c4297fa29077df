"""The path of an output file: checks before a run, and the write at its end."""

from __future__ import annotations

import os
from pathlib import Path

from megascore.errors import ScoreFileError
from megascore.files.whole import temporary_name, write_whole

__all__ = ["check_output_path", "write_output"]

ALLOW = "run.overwrite=true"


def check_output_path(path: str | Path, overwrite: bool) -> None:
    """Check, before a long run, that a file can be written at its end; leaves nothing behind.

    Really creates and removes a file, in the folder of `path` or, where that is still to be made, in the nearest one
    above it.

    Raises:
        ScoreFileError: a file is there and `overwrite` is false, or nothing can be written there.
    """
    target = _followed(Path(path), overwrite)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = temporary_name(folder / target.name)
    try:
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        probe_text = f"no file can be made in {folder} ({error.strerror or error})"
        raise ScoreFileError(
            f"can't write {target}: {probe_text}. Choose another path, or make the folder writable."
        ) from error


def write_output(path: str | Path, content: bytes, overwrite: bool, allow: str = ALLOW) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file.
        content: All of it.
        overwrite: Replace a file that is there.
        allow: How the user allows that.

    Raises:
        ScoreFileError: a file is there and `overwrite` is false, or the system refuses.
    """
    target = _followed(Path(path), overwrite, allow)
    try:
        # Asked again at the end: somebody may have written it during the run.
        write_whole(target, content, before_rename=lambda: _refuse_existing(target, overwrite, allow))
    except OSError as error:
        raise ScoreFileError(
            f"can't write {target}: {error.strerror or error}. Free the disk or choose another path."
        ) from error


def _followed(path: Path, overwrite: bool, allow: str = ALLOW) -> Path:
    """Return where a file is written: behind a link the file that it points to, so that the link stays one.

    Raises:
        ScoreFileError: something is there that may not be replaced.
    """
    _refuse_existing(path, overwrite, allow)
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=False)
    except (OSError, RuntimeError) as error:
        raise ScoreFileError(f"can't write {path}: it is a link that leads nowhere ({error}).") from error
    if not target.parent.is_dir():
        raise ScoreFileError(f"can't write {path}: it is a link into {target.parent}, and there is no such folder.")
    _refuse_existing(target, overwrite, allow)
    return target


def _refuse_existing(target: Path, overwrite: bool, allow: str) -> None:
    try:
        is_folder, exists = target.is_dir(), os.path.lexists(target)
    except OSError as error:
        raise ScoreFileError(f"can't write {target}: {error.strerror or error}. Choose another path.") from error
    if is_folder:
        raise ScoreFileError(f"can't write {target}: it is a folder. Give the path of a file in it.")
    if exists and not target.is_file() and (not target.is_symlink() or target.exists()):
        raise ScoreFileError(
            f"can't write {target}: it is a device, a pipe or a socket: expected a regular file, or none. "
            "Choose another path."
        )
    if exists and not overwrite:
        raise ScoreFileError(f"{target} exists already: choose another path, or allow replacing it ({allow}).")
