"""The language-model loss of a job, added up over steps and ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from megascore.mcore.pipeline.schedule import LossSums
from megascore.mcore.world.groups import is_first_tensor_rank
from megascore.parallel.comm import sum_in_place, world_rank

__all__ = ["LossTotal"]


class LossTotal:
    """The loss over all tokens so far, as sums: [nats, tokens] float64 on every rank, that are added up on demand."""

    def __init__(self, device: torch.device) -> None:
        """Start at nothing."""
        self._own = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, losses: LossSums) -> None:
        """Add this rank's losses of some micro-batches."""
        self._own[0] += losses.nats
        self._own[1] += losses.num_tokens

    def sums(self) -> Mapping[str, Tensor]:
        """Return the sums over all ranks. Collective over the world."""
        merged = self._own.clone()
        # Tensor-parallel ranks of the last stage hold the same loss: one of them counts.
        if not is_first_tensor_rank():
            merged.zero_()
        sum_in_place([merged])
        return {"loss": merged.cpu()}

    def restore(self, merged: Tensor) -> None:
        """Take over what `sums` returned. All ranks do it, and the first one has it then."""
        self._own.zero_()
        if world_rank() == 0:
            self._own.copy_(merged)

    def mean(self) -> float | None:
        """Return the mean loss in nats per token; None where documents of one token each predict nothing.

        None, too, where it is NaN or infinite, of which rank 0 warns: scores are taken before the output layer, and
        stay. Collective over the world.
        """
        nats, num_tokens = self.sums()["loss"].tolist()
        if not num_tokens:
            return None
        loss = float(nats / num_tokens)
        if math.isfinite(loss):
            return loss
        if world_rank() == 0:
            warnings.warn(
                f"the loss over {num_tokens:.0f} tokens is {loss}, while scores are finite: check the weights of the "
                "output layer. The score file has the scores, and null for the loss.",
                stacklevel=2,
            )
        return None
