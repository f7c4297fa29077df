"""Blocks that are done in a run block by block: their results, as a checkpoint holds them, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.blockwise.parts import ModelParts
from megascore.errors import CheckpointError
from megascore.hooks.statistics import State, Statistic, differences
from megascore.mcore.models.empty_layers import filled
from megascore.mcore.pipeline.layers import LayerOrder
from megascore.parallel.comm import agree
from megascore.parallel.merge import Plan
from megascore.resume.snapshot import Snapshot
from megascore.runs.results import Results
from megascore.runs.scoring_run import ScoringRun
from megascore.sites.site import REPLICATES, SCORE, groups_of

__all__ = ["DoneBlocks", "check_done"]

_SAVED = ("score", "replicates")
"""What of a block's results is saved beside its statistics, and called so."""


class DoneBlocks:
    """Merged results, the same on every rank; a block's scores too, for its weights may be gone later."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        """Begin with nothing, or with what a checkpoint holds."""
        self.results = Results()
        self.num_blocks = 0
        """Blocks that are done; what lies outside of blocks counts as one more."""
        if snapshot is not None:
            self.num_blocks = snapshot.cursor["block"]
            self.results.states.update({key: dict(state) for key, state in snapshot.states.items()})
            for kind, values in self._saved().items():
                prefix = f"{kind}/"
                found = {name: value for name, value in snapshot.sums.items() if name.startswith(prefix)}
                values.update({name.removeprefix(prefix): value for name, value in found.items()})

    def add(self, results: Results) -> None:
        """Take over the results of the next block."""
        self.results.update(results)
        self.num_blocks += 1

    @property
    def cursor(self) -> Mapping[str, int]:
        """How far the run is, for a checkpoint."""
        return {"step": 0, "block": self.num_blocks}

    def merged_states(self) -> Mapping[str, State]:
        """Return the statistics of all blocks that are done. Not collective: they are merged already."""
        return self.results.states

    def merged_scores(self) -> dict[str, Tensor]:
        """Return the scores of these blocks, under names that a checkpoint can hold beside other sums."""
        return {f"{kind}/{key}": value for kind, values in self._saved().items() for key, value in values.items()}

    def _saved(self) -> dict[str, dict[str, Tensor]]:
        return dict(zip(_SAVED, (self.results.scores, self.results.replicates), strict=True))


def check_done(done: DoneBlocks, order: LayerOrder, parts: ModelParts, device: torch.device) -> None:
    """Compare saved results with what is declared by the hooks of the layers that are done, statistic by statistic.

    The hooks are made once more for that, a layer at a time. No weights are read: memory that stands for them holds
    any values meanwhile. Collective over the world.

    Args:
        done: What a checkpoint holds.
        order: The layers.
        parts: What is scored in them, and behind them.
        device: Of this rank.

    Raises:
        CheckpointError: sites, statistics or scores are missing, or are foreign, or of another shape or type; every
            difference is named.
    """
    agree("counting the layers that are done", lambda: _check_number(done.num_blocks, order.num_layers))
    statistics: dict[str, tuple[Statistic, ...]] = {}
    scores: dict[str, tuple[Statistic, ...]] = {}
    for run in _runs_of(done, order, parts, device):
        if run is not None:
            run.close()
            own_statistics, own_scores = run.declared
            statistics.update(own_statistics)
            scores.update(own_scores)
            done.results.groups.update(groups_of(own_scores))
    agree("comparing the layers that are done", lambda: _check_results(done, statistics, scores))


def _runs_of(
    done: DoneBlocks, order: LayerOrder, parts: ModelParts, device: torch.device
) -> Iterator[ScoringRun | None]:
    """Give what scores each block that is done, while there is memory for its weights. Collective over the world."""
    for number in range(min(done.num_blocks, order.num_layers)):
        with ExitStack() as stack:
            agree(f"making room for layer {number}", partial(_fill, order.own_layer(number), device, stack))
            yield parts.scoring(number)
    if done.num_blocks > order.num_layers:
        yield parts.scoring(order.num_layers)


def _fill(layer: nn.Module | None, device: torch.device, stack: ExitStack) -> None:
    if layer is not None:
        stack.enter_context(filled(layer, device))
        # Weights that wait in host memory.
        stack.enter_context(MovingWeights(layer, device).present(layer))


def _check_number(num_blocks: int, num_layers: int) -> None:
    # What follows the layers counts as one more.
    if not 0 <= num_blocks <= num_layers + 1:
        raise CheckpointError(
            f"the checkpoint tells of {num_blocks} blocks that are done, and this model has {num_layers} layers and "
            "what follows them: it is not of this run."
        )


def _check_results(done: DoneBlocks, statistics: Plan, scores: Plan) -> None:
    found = _differences("saved state", statistics, done.results.states)
    saved = {key: {SCORE: own} for key, own in done.results.scores.items()}
    for key, own in done.results.replicates.items():
        # One without its score is told by that.
        if key in saved:
            saved[key][REPLICATES] = own
    found += _differences("saved score", scores, saved)
    if found:
        raise CheckpointError(
            f"the saved results of {done.num_blocks} blocks are not of this run: {'; '.join(found)}. Go on with "
            "another checkpoint, or start from the beginning with run.resume=never."
        )


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
