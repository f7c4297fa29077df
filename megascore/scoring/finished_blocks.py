"""The results of the blocks that are done, as something that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megascore.hooks.statistics import State
from megascore.scoring.results import Results
from megascore.scoring.snapshot import Snapshot

__all__ = ["FinishedBlocks"]

_SCORE = "score/"


class FinishedBlocks:
    """Merged results, the same on every rank; a block's scores too, for its weights may be gone later."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        """Begin with nothing, or with what a checkpoint holds."""
        self.results = Results()
        self.num_blocks = 0
        """Blocks that are done; what lies outside of blocks counts as one more."""
        if snapshot is not None:
            self.num_blocks = snapshot.cursor["block"]
            self.results.states.update({key: dict(state) for key, state in snapshot.states.items()})
            self.results.scores.update(
                {name.removeprefix(_SCORE): value for name, value in snapshot.sums.items() if name.startswith(_SCORE)}
            )

    def add(self, results: Results) -> None:
        """Take over the results of the next block."""
        self.results.update(results)
        self.num_blocks += 1

    @property
    def cursor(self) -> Mapping[str, int]:
        """How far the run is, for a checkpoint."""
        return {"step": 0, "block": self.num_blocks}

    def merged_states(self) -> Mapping[str, State]:
        """Return the statistics of all finished blocks. Not collective: they are merged already."""
        return self.results.states

    def merged_scores(self) -> dict[str, Tensor]:
        """Return the finished scores, under names that a checkpoint can hold beside other sums."""
        return {f"{_SCORE}{key}": score for key, score in self.results.scores.items()}
