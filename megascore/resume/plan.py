"""The plan of a run's checkpoints: where they are, and when one is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megascore.errors import ConfigError

__all__ = ["CheckpointPlan", "Timer"]

SAVE_SHARE = 100
"""A checkpoint that the clock asks for comes after at least this many times what the last one took: 1 % of a run."""


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


class Timer:
    """When the next checkpoint is due, by steps and by time. Its time begins when it is made."""

    def __init__(self, plan: CheckpointPlan, total_steps: int, clock: Callable[[], float]) -> None:
        """Start.

        Args:
            plan: When to save.
            total_steps: Of the whole run; of each block where blocks are scored one at a time.
            clock: Returns seconds.
        """
        self._plan = plan
        self._total_steps = max(1, total_steps)
        self._clock = clock
        self._saved_at = clock()
        self._save_took = 0.0

    def is_due(self, cursor: Mapping[str, int]) -> bool:
        """Return whether a checkpoint is due when so much is done."""
        if self._plan.interval is not None and self._is_multiple(cursor, self._plan.interval):
            return True
        waited = self._clock() - self._saved_at
        return self._plan.seconds is not None and waited >= max(self._plan.seconds, SAVE_SHARE * self._save_took)

    def saved(self, started: float) -> float:
        """Begin again, after a checkpoint that was begun at ``started``; return the seconds that it took."""
        self._saved_at = self._clock()
        self._save_took = self._saved_at - started
        return self._save_took

    def _is_multiple(self, cursor: Mapping[str, int], interval: int) -> bool:
        """Return whether the steps so far are a multiple of the interval, or came past one in the last block."""
        if "block" not in cursor:
            return cursor["step"] % interval == 0
        steps = cursor["block"] * self._total_steps
        return steps // interval > (steps - self._total_steps) // interval
