"""The folder of a run, as the one process sees it that reads and writes it: lock, checkpoints, ``progress.json``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascore.errors import CheckpointError
from megascore.files.locks import owner_of, take_lock
from megascore.files.tensor_file import DamagedFile
from megascore.files.whole import write_whole
from megascore.process.closing import Closing
from megascore.resume.progress_file import LOCK_NAME, PROGRESS_NAME, ProgressFile, read_status
from megascore.resume.snapshot import Snapshot, describe_cursor, differences

__all__ = ["Found", "RunFolder"]

KEPT = 2
"""Checkpoints that are kept: the newest, and one before it in case the storage damages the newest."""
_NAME = re.compile(r"megascore-step-(\d{8})(?:-block-(\d{4}))?\.safetensors")
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


class RunFolder(Closing):
    """A locked folder; ``with RunFolder(path) as folder``. Only rank 0 has one, and nothing here talks to other ranks.

    All methods touch the storage, and raise OSError where the system refuses.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None] = lambda text: None, write: Callable[..., None] = write_whole
    ) -> None:
        """Make the folder if it is missing, and take its lock.

        Args:
            path: The folder.
            say: Tells the user something.
            write: Writes a file, with the arguments of `write_whole`.

        Raises:
            CheckpointError: another run is in it, or the system refuses.
        """
        self.path = path
        self._say = say
        self._write = write
        self._good: list[Path] = []
        self.progress = ProgressFile(path, write)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._inode = self._on_disk()
            self._lock = take_lock(path / LOCK_NAME, seconds=_LOCK_SECONDS)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is using the checkpoint folder {path} ({owner_of(path / LOCK_NAME) or 'unknown'}): wait "
                "for it, stop it, or give this run a folder of its own (run.checkpoint_dir)."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {path} can't be used: {error.strerror or error}. Make it a writable folder on a "
                "file system with locks, or choose another one (run.checkpoint_dir)."
            ) from error
        # What killed runs left half written; the lock says that nobody is writing.
        for rest in path.glob(".*.tmp"):
            with suppress(OSError):
                rest.unlink()

    def close(self) -> None:
        """Release the lock; the system does it for a process that is killed."""
        self._lock.close()

    def find(self, identity: Mapping[str, Any]) -> Found | None:
        """Return the checkpoint to go on from, which stays until newer ones are there; None to start at the beginning.

        Raises:
            CheckpointError: there is one, and it is damaged or another run's, with every difference named; or it was
                removed.
        """
        found = self.newest()
        if found is None:
            self._refuse_lost_checkpoints()
            self._say(f"no checkpoint in {self.path.resolve()}: starting from the beginning")
            return None
        other = differences(found.snapshot.identity, identity)
        if other:
            raise CheckpointError(
                f"{found.path} is another run's: {'; '.join(other)}. Start with the old settings, choose another "
                "run.checkpoint_dir, or start from the beginning with run.resume=never."
            )
        for text in found.skipped:
            self._say(f"damaged checkpoint left out: {text}")
        self._say(f"going on from {found.path}, {describe_cursor(found.snapshot.cursor)}")
        self._good = [found.path]
        return found

    def newest(self) -> Found | None:
        """Return the newest whole checkpoint; None where there is none at all. Changes nothing.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged, or the newest whole one can't be used.
        """
        skipped: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                data = path.read_bytes()
                return Found(path, data, Snapshot.from_bytes(data), tuple(skipped))
            except OSError as error:
                skipped.append(f"{path.name} can't be read ({error.strerror or error})")
            except DamagedFile as error:
                skipped.append(f"{path.name} {error}")
            except CheckpointError as error:
                raise CheckpointError(f"{path} can't be resumed: {error}.") from error
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

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint that this run wrote or went on from."""
        return self._good[-1] if self._good else None

    def write(self, snapshot: Snapshot) -> tuple[Path, int]:
        """Write a checkpoint whole or not at all, drop those that are not needed any more, and return path and size.

        Raises:
            OSError: the system refuses, or the folder is not the one that was opened.
        """
        data = snapshot.to_bytes()
        path = self.path / _name_of(snapshot.cursor)
        self._require_same_folder()
        self._write(path, data, before_rename=self._require_same_folder, make_folder=False)
        earlier = [good for good in self._good if good != path]
        self._good = [*earlier[1 - KEPT :], path]
        for other in self.checkpoints():
            if other not in self._good:
                other.unlink(missing_ok=True)
        return path, len(data)

    def start_afresh(self, launch: str, *, is_restart: bool) -> None:
        """Remove what earlier runs left here, once for each launch: its own restarts go on from its own checkpoints.

        Args:
            launch: Name of this launch of the program.
            is_restart: Whether the launcher itself has started the ranks again.
        """
        marker = self.path / _AFRESH
        if marker.is_file() and (is_restart or marker.read_text(encoding="utf-8") == launch):
            return
        # The marker is there only while everything older is gone.
        marker.unlink(missing_ok=True)
        (self.path / PROGRESS_NAME).unlink(missing_ok=True)
        for path in self.checkpoints():
            path.unlink(missing_ok=True)
            self._say(f"dropped {path}: run.resume=never")
        self._write(marker, launch.encode(), make_folder=False)

    def _refuse_lost_checkpoints(self) -> None:
        if not (self.path / PROGRESS_NAME).is_file():
            return
        try:
            last = read_status(self.path).get("last_checkpoint")
        except CheckpointError as error:
            # It is written without waiting for the disk until a checkpoint is there.
            self._say(f"{error} It is made again.")
            return
        if last is not None:
            raise CheckpointError(
                f"{self.path} has no checkpoint, but its {PROGRESS_NAME} tells of {last.get('file')}: it was "
                "removed. Put it back, or start from the beginning with run.resume=never."
            )

    def _on_disk(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino

    def _require_same_folder(self) -> None:
        # A folder that is made again, or lies under a mount that is gone, has neither this run's lock nor its files.
        if self._on_disk() != self._inode:
            raise FileNotFoundError(2, "the folder was replaced while the run went on", str(self.path))


def _name_of(cursor: Mapping[str, int]) -> str:
    block = f"-block-{cursor['block']:04d}" if "block" in cursor else ""
    return f"megascore-step-{cursor['step']:08d}{block}.safetensors"
