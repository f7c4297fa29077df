"""What rank 0 does for all with the folder of a run: find, write, tell how far it is.

Every access to the storage has a deadline, so that a file system that hangs becomes an error while the other ranks
still wait for it. Nothing here talks to other ranks.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megascore.errors import CheckpointError, ConfigError
from megascore.process.deadline import within
from megascore.resume.folder import PROGRESS_NAME, CheckpointFolder, Found
from megascore.resume.progress_file import RunState, StatusFile, read_status
from megascore.resume.snapshot import Snapshot, differences

__all__ = ["CheckpointKeeper", "CheckpointPlan"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class CheckpointPlan:
    """Where and when to save."""

    folder: Path
    interval: int | None = None
    """Steps between checkpoints."""
    seconds: float | None = 300.0
    """Time between checkpoints, by rank 0's clock."""
    afresh: bool = False
    """Drop the checkpoints that are there."""
    storage_seconds: float = 150.0
    """How long the storage may take to answer; several answers must fit into what ranks wait for each other."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: an interval below 1, or a time that is not positive.
        """
        if self.interval is not None and self.interval < 1:
            raise ConfigError(f"the interval between checkpoints is {self.interval}: expected at least 1 step.")
        for name, value in (("between checkpoints", self.seconds), ("for the storage", self.storage_seconds)):
            if value is not None and not value > 0:
                raise ConfigError(f"the time {name} is {value} s: expected a positive number.")


class CheckpointKeeper:
    """The folder, locked, and its progress file."""

    def __init__(self, plan: CheckpointPlan, say: Callable[[str], None]) -> None:
        """Open the folder.

        Args:
            plan: Where.
            say: Tells the user something.

        Raises:
            CheckpointError: another run is in it, or it can't be used.
        """
        self._plan = plan
        self._say = say
        self._folder: CheckpointFolder | None = None
        self._status: StatusFile | None = None
        self._folder = self._storage("opening it", lambda: CheckpointFolder(plan.folder))

    def close(self) -> None:
        """Release the folder."""
        self._open_folder.close()

    def find(self, identity: Mapping[str, Any]) -> Found | None:
        """Return the checkpoint to go on from; None to start from the beginning.

        Raises:
            CheckpointError: there is one, and it is damaged or another run's; every difference is named.
        """
        return self._storage("looking for a checkpoint", lambda: self._find(identity))

    def begin(self, total_steps: int, snapshot: Snapshot | None, facts: Mapping[str, Any]) -> None:
        """Begin the progress file."""
        self._status = StatusFile(self._plan.folder, total_steps, facts)
        last = self._open_folder.last_good()
        entry = None if last is None or snapshot is None else {"file": last.name, **snapshot.cursor}
        self.note({**({"step": 0} if snapshot is None else snapshot.cursor), "last_checkpoint": entry}, now=True)

    def note(self, entries: Mapping[str, Any], *, now: bool = False) -> None:
        """Put entries into the progress file; without ``now`` it is written once a second at most.

        Raises:
            CheckpointError: it can't be written.
        """
        status = self._status
        if status is not None:
            self._storage(f"writing {PROGRESS_NAME}", lambda: status.update(entries, now=now))

    def save(self, snapshot: Snapshot, seconds: Callable[[], float]) -> None:
        """Write a checkpoint, and say so.

        Args:
            snapshot: What to write.
            seconds: Returns the time that it has taken so far.

        Raises:
            CheckpointError: it can't be written; the last good one stands.
        """
        what = f"writing the checkpoint of {snapshot.position}"
        data = snapshot.to_bytes()
        path = self._storage(what, lambda: self._open_folder.write(snapshot, data))
        took = seconds()
        self._say(f"checkpoint of {snapshot.position}: {path}, {len(data) / 1e6:,.1f} MB in {took:.2f} s")
        entry = {"file": path.name, **snapshot.cursor, "bytes": len(data), "seconds": round(took, 3)}
        self.note({"last_checkpoint": entry}, now=True)

    def end(self, state: RunState, error: str | None = None) -> None:
        """Say in the progress file how the run ended."""
        finished = {"eta_seconds": 0} if state is RunState.FINISHED else {}
        self.note({"state": state.value, "error": error, **finished}, now=True)

    def note_finished(self) -> None:
        """Let a progress file say that the run is finished, where the run was killed just before it would have."""
        folder = self._plan.folder

        def mend() -> None:
            try:
                state = read_status(folder)["state"]
            except CheckpointError:
                state = None
            if state != RunState.FINISHED.value:
                status = StatusFile(folder, 0, {})
                status.update({"state": RunState.FINISHED.value, "eta_seconds": 0}, now=True)

        self._storage(f"writing {PROGRESS_NAME}", mend)

    @property
    def is_finished(self) -> bool:
        """Whether the progress file says that the run is finished."""
        try:
            return bool(read_status(self._plan.folder)["state"] == RunState.FINISHED.value)
        except CheckpointError:
            return False

    @property
    def _open_folder(self) -> CheckpointFolder:
        assert self._folder is not None
        return self._folder

    def _find(self, identity: Mapping[str, Any]) -> Found | None:
        folder = self._open_folder
        if self._plan.afresh:
            for path in folder.start_afresh(_launch(), is_restart=_is_restart()):
                self._say(f"dropped {path}: run.resume=never")
        found = folder.newest()
        if found is None:
            self._refuse_lost_checkpoints()
            self._say(f"no checkpoint in {self._plan.folder.resolve()}: starting from the beginning")
            return None
        other = differences(found.snapshot.identity, identity)
        if other:
            raise CheckpointError(
                f"{found.path} is another run's: {'; '.join(other)}. Start with the old settings, choose another "
                "run.checkpoint_dir, or start from the beginning with run.resume=never."
            )
        for text in found.skipped:
            self._say(f"damaged checkpoint left out: {text}")
        self._say(f"going on from {found.path}, {found.snapshot.position}")
        folder.trust(found)
        return found

    def _refuse_lost_checkpoints(self) -> None:
        if not (self._plan.folder / PROGRESS_NAME).is_file():
            return
        try:
            last = read_status(self._plan.folder).get("last_checkpoint")
        except CheckpointError as error:
            # It is written without waiting for the disk until a checkpoint is there.
            self._say(f"{error} It is made again.")
            return
        if last is not None:
            raise CheckpointError(
                f"{self._plan.folder} has no checkpoint, but its {PROGRESS_NAME} tells of {last.get('file')}: it was "
                "removed. Put it back, or start from the beginning with run.resume=never."
            )

    def _storage(self, what: str, function: Callable[[], Result]) -> Result:
        """Run what touches the storage, within its time; a refusal of the system becomes an error that names it."""
        try:
            return within(self._plan.storage_seconds, function)
        except OSError as error:
            last = self._folder.last_good() if self._folder is not None else None
            stands = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
            raise CheckpointError(
                f"{what} failed in {self._plan.folder} (run.checkpoint_dir), on rank 0: {error.strerror or error}; "
                f"{stands}. Mend the storage and run the same command: it goes on from there."
            ) from error


def _launch() -> str:
    """Return what tells this launch of the program from others, the same for restarts by torchrun's agent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return uuid.uuid4().hex
    return f"process {os.getppid()} on {socket.gethostname()}"


def _is_restart() -> bool:
    """Tell whether torchrun has restarted the ranks, or Slurm has requeued the job."""
    counts = (os.environ.get(name) or "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count != "0" for count in counts)
