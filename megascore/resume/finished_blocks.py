"""The results of the blocks that are done, as something that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megascore.errors import CheckpointError
from megascore.hooks.statistics import State, differences
from megascore.parallel.merge import Plan
from megascore.resume.snapshot import Snapshot
from megascore.runs.results import Results
from megascore.sites.site import SCORE

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

    def check(self, statistics: Plan, scores: Plan) -> None:
        """Refuse results that are not those of the blocks that are done. Not collective.

        Args:
            statistics: What the sites in these blocks keep, by key.
            scores: Their finished scores.

        Raises:
            CheckpointError: sites, statistics or scores are missing, or are foreign, or of another shape or type; every
                difference is named.
        """
        found = _differences("saved state", statistics, self.results.states)
        found += _differences("saved score", scores, {key: {SCORE: own} for key, own in self.results.scores.items()})
        if found:
            raise CheckpointError(
                f"the saved results of {self.num_blocks} blocks are not of this run: {'; '.join(found)}. Go on with "
                "another checkpoint, or start from the beginning with run.resume=never."
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


def _differences(what: str, declared: Plan, saved: Mapping[str, State]) -> list[str]:
    missing = [f"{key} has no {what}" for key in declared if key not in saved]
    foreign = [f"{key} has a {what}, but is in none of these blocks" for key in saved if key not in declared]
    other = [
        f"{key}: {difference}"
        for key, statistics in declared.items()
        if key in saved
        for difference in differences(statistics, saved[key])
    ]
    return [*missing, *foreign, *other]
