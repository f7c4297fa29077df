"""Whether the finished layers of a checkpoint are what this run would have made of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.blockwise.parts import ModelParts
from megascore.errors import CheckpointError
from megascore.hooks.statistics import Statistic
from megascore.mcore.models.empty_layers import filled
from megascore.mcore.pipeline.layers import LayerOrder
from megascore.parallel.comm import agree
from megascore.resume.finished_blocks import FinishedBlocks
from megascore.runs.scoring_run import ScoringRun

__all__ = ["check_finished"]


def check_finished(done: FinishedBlocks, order: LayerOrder, parts: ModelParts, device: torch.device) -> None:
    """Compare saved results with what is declared by the hooks of the layers that are done, statistic by statistic.

    The hooks are made once more for that, a layer at a time. No weights are read: those that are not there are of no
    value meanwhile. Collective over the world.

    Args:
        done: What a checkpoint holds.
        order: The layers.
        parts: What is scored in them, and behind them.
        device: Of this rank.

    Raises:
        CheckpointError: every difference is named.
    """
    agree("counting the finished layers", lambda: _check_number(done.num_blocks, order.num_layers))
    declared = _Declared()
    for number in range(min(done.num_blocks, order.num_layers)):
        with ExitStack() as stack:
            agree(f"making room for layer {number}", partial(_fill, order.own_layer(number), device, stack))
            declared.add(parts.scoring(number))
    if done.num_blocks > order.num_layers:
        declared.add(parts.scoring(order.num_layers))
    agree("comparing the finished layers", lambda: done.check(declared.statistics, declared.scores))


class _Declared:
    def __init__(self) -> None:
        self.statistics: dict[str, tuple[Statistic, ...]] = {}
        self.scores: dict[str, tuple[Statistic, ...]] = {}

    def add(self, run: ScoringRun | None) -> None:
        if run is not None:
            run.close()
            statistics, scores = run.declared
            self.statistics.update(statistics)
            self.scores.update(scores)


def _fill(layer: nn.Module | None, device: torch.device, stack: ExitStack) -> None:
    if layer is not None:
        stack.enter_context(filled(layer, device))
        # Those that wait in host memory.
        stack.enter_context(MovingWeights(layer, device).present(layer))


def _check_number(num_blocks: int, num_layers: int) -> None:
    # What follows the layers counts as one more.
    if not 0 <= num_blocks <= num_layers + 1:
        raise CheckpointError(
            f"the checkpoint tells of {num_blocks} finished blocks, and this model has {num_layers} layers and what "
            "follows them: it is not of this run."
        )
