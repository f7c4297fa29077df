"""Small values that a config is resolved into, once: what the parts of a job are handed instead of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascore.config import JobConfig, ParallelConfig
from megascore.errors import ScoreFileError
from megascore.mcore.models.source import ModelSource
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.resume.snapshot import fingerprint_of
from megascore.scores.score_file import Scores, check_output_path, load_scores

__all__ = ["ModelForm", "Output"]


@dataclass(frozen=True)
class ModelForm:
    """How a model is built on this rank."""

    parallel: ParallelConfig
    dtype: torch.dtype
    device: torch.device
    sequence_length: int

    @classmethod
    def of(cls, config: JobConfig, device: torch.device) -> ModelForm:
        """Read it from a config."""
        return cls(config.parallel, getattr(torch, config.model.dtype), device, config.data.sequence_length)

    def build(self, source: ModelSource) -> list[Any]:
        """Build the chunks of this rank without weights; as `ModelSource.build`, also in what it raises."""
        return source.build(self.parallel, self.dtype, self.device, self.sequence_length)


@dataclass(frozen=True)
class Output:
    """The score file of a job; rank 0 reads and writes it."""

    path: str
    overwrite: bool

    def check(self, *, may_be_there: bool = False) -> None:
        """Refuse a path that cannot be written, or a file that may not be replaced. Not collective.

        Raises:
            ScoreFileError: naming the path.
        """
        if world_rank() == 0:
            check_output_path(self.path, overwrite=self.overwrite or may_be_there)

    def scores_of(self, identity: Mapping[str, Any]) -> Scores | None:
        """Return the scores that the run of this identity has written before, on every rank. Collective."""

        def read() -> Scores | None:
            if world_rank() != 0 or not Path(self.path).is_file():
                return None
            try:
                scores = load_scores(self.path)
            except ScoreFileError:
                # Whether some other file may be replaced is asked by `check`.
                return None
            return scores if scores.metadata.get("run_fingerprint") == fingerprint_of(identity) else None

        return broadcast_object(agree("looking for a finished result", read))

    def write(self, scores: Scores) -> None:
        """Write the file. Collective over the world."""
        agree("writing the score file", lambda: scores.save(self.path, overwrite=self.overwrite))
