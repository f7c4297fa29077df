"""The errors that users see. Each text says what came, what was expected, where, and what to do next."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HookStateError",
    "LayoutError",
    "MegascoreError",
    "ModelError",
    "PlanError",
    "Preempted",
    "RankFailure",
    "ScoreFileError",
]


class MegascoreError(Exception):
    """Base of every error that megascore raises for its users."""

    is_told = False
    """Another rank says it, or what it follows from, on the console: this one ends without a word."""


class ConfigError(MegascoreError, ValueError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""


class LayoutError(MegascoreError, ValueError):
    """The model, the world size and the parallel layout do not fit together."""


class DataError(MegascoreError, ValueError):
    """Calibration data is missing, unreadable, or too little for the run."""


class ModelError(MegascoreError, ValueError):
    """A model or checkpoint is missing, unknown, or does not have the tensors that it should."""


class PlanError(MegascoreError, ValueError):
    """A plan for a smaller model is damaged, asks for what can't be, or does not fit the model or the scores."""


class ScoreFileError(MegascoreError, ValueError):
    """A score file is missing, foreign, of another schema, or cannot be written."""


class CheckpointError(MegascoreError, ValueError):
    """A checkpoint of a run is damaged, belongs to another run, or cannot be written."""


class HookStateError(MegascoreError, ValueError):
    """A hook was given a state or an input that is not its own."""


class RankFailure(MegascoreError, RuntimeError):  # noqa: N818 - it names an event, seen by all ranks, not a mistake
    """Another rank failed; the text holds the rank and its own error."""

    is_own = False
    """This rank has found the very error that the other one tells, and ends with the same exit code."""


class Preempted(MegascoreError, RuntimeError):  # noqa: N818 - it names an event, and nothing went wrong
    """A signal asked the run to stop, and it did so at the end of a step, with everything saved."""

    is_of_one_rank = False
    """Not all ranks raise it, so that the one that does says it, and not rank 0."""
