"""Two models' predictions for the same tokens, compared where the logits are: on the ranks of the last stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.context_parallel import local_positions

__all__ = ["PAIR_SUMS", "Predictions", "compare_predictions", "predictions"]

PAIR_SUMS = ("tokens", "nats", "other_nats", "kl", "agreement", "acceptance")
"""Columns of what `compare_predictions` returns, each a sum over the predicted tokens of a sample."""
POSITIONS_AT_ONCE = 512
"""Whole vocabularies are large: beside the log-probabilities, values of so many positions are in memory at a time."""


class Predictions:
    """One model's log-probabilities for a micro-batch, on a rank that has its logits.

    They are of this context-parallel rank's positions, over a vocabulary that is split over tensor-parallel ranks:
    [B, S, V / TP], in the type of the logits, float32 at least. All methods are collective over the tensor axis.
    """

    def __init__(self, logits: Tensor, vocab_size: int | None) -> None:
        """Normalize.

        Args:
            logits: [B, S, V / TP]; not changed.
            vocab_size: How many of the V entries are tokens; those behind them pad the vocabulary. None: all are.
        """
        self._group = parallel_state.get_tensor_model_parallel_group()
        values = logits.clone() if logits.dtype in (torch.float32, torch.float64) else logits.float()
        size = values.shape[-1]
        self._offset = dist.get_rank(self._group) * size
        num_tokens = size if vocab_size is None else max(0, min(size, vocab_size - self._offset))
        self._padding = slice(num_tokens, size)
        values[..., self._padding] = -torch.inf
        own_largest, own_best = values.max(-1)
        largest = own_largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        # Of equal ones that with the smaller number is the best, whatever the layout.
        none = torch.iinfo(torch.int64).max
        self.best = (own_best + self._offset).where(own_largest == largest, none)
        """[B, S] the most likely token, the same on all tensor-parallel ranks."""
        dist.all_reduce(self.best, op=dist.ReduceOp.MIN, group=self._group)
        values -= largest.unsqueeze(-1)
        for part in _parts(values.shape[1]):
            values[:, part] -= self.summed(values[:, part].exp()).log().unsqueeze(-1).to(values.dtype)
        self.values = values

    def nats(self, labels: Tensor, part: slice) -> Tensor:
        """Return the negative log-likelihood of labels [B, s], of a part of the positions: float64."""
        values = self.values[:, part]
        local = labels - self._offset
        is_here = (local >= 0) & (local < values.shape[-1])
        picked = values.gather(-1, local.where(is_here, 0).unsqueeze(-1))
        return -self.summed(picked.where(is_here.unsqueeze(-1), 0.0))

    def divergence(self, other: Predictions, part: slice) -> Tensor:
        """Return KL(this || other) in nats, of a part of the positions: [B, s] float64."""
        values = self.values[:, part]
        difference = values - other.values[:, part]
        # Where there is no token both are -inf.
        difference[..., self._padding] = 0.0
        return self.summed(values.exp().mul_(difference))

    def overlap(self, other: Predictions, part: slice) -> Tensor:
        """Return the sum over the vocabulary of the smaller probability, of a part: [B, s] float64."""
        return self.summed(torch.minimum(self.values[:, part], other.values[:, part]).exp_())

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over the whole vocabulary, float64."""
        own = values.sum(-1, dtype=torch.float64)
        dist.all_reduce(own, group=self._group)
        return own


@torch.no_grad()
def predictions(chunks: Sequence[Any], tokens: Tensor) -> Predictions | None:
    """Run one micro-batch and return its predictions; None on ranks that do not have them.

    Collective over tensor, context and pipeline ranks, with the same micro-batch.

    Args:
        chunks: The virtual-pipeline chunks of this rank.
        tokens: [B, S] int64, whole sequences.
    """
    with _catching(chunks[-1]) as caught:
        forward_only(chunks, [tokens], compute_loss=True)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    assert len(caught) == 1, "one micro-batch goes once through the last chunk"
    return Predictions(caught.pop(), getattr(chunks[-1], "vocab_size", None))


@torch.no_grad()
def compare_predictions(one: Predictions, other: Predictions, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Compare next-token predictions of two models.

    Collective over the tensor axis.

    Args:
        one: Of the first model, whose distribution the divergence is from.
        other: Of the second one.
        tokens: [B, S] int64, whole sequences, on the device of the logits.
        mask: Which tokens count, [B, S] bool; None: all.

    Returns:
        [B, 6] float64, sums over the predicted tokens of this context-parallel rank, by `PAIR_SUMS`: how many; negative
        log-likelihood of both in nats; KL(one || other) in nats; whether both have the same most likely token; the sum
        over the vocabulary of the smaller probability (what speculative sampling would accept). The same on
        tensor-parallel ranks.
    """
    device = one.values.device
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    positions = local_positions(tokens.shape[1], rank, size, device)
    # The last token of a sequence, the last one of the first context-parallel rank, has none after it to predict.
    num_predicting = len(positions) - (rank == 0)
    following = positions[:num_predicting] + 1
    labels = tokens[:, following]
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.to(device)[:, following]
    sums = torch.zeros(len(tokens), len(PAIR_SUMS), dtype=torch.float64, device=device)
    for part in _parts(num_predicting):
        own_labels = labels[:, part]
        values = [
            torch.ones_like(own_labels, dtype=torch.float64),
            one.nats(own_labels, part),
            other.nats(own_labels, part),
            one.divergence(other, part),
            (one.best[:, part] == other.best[:, part]).double(),
            one.overlap(other, part),
        ]
        sums += (torch.stack(values, dim=-1) * counted[:, part].unsqueeze(-1)).sum(1)
    return sums


def _parts(length: int) -> Iterator[slice]:
    for start in range(0, length, POSITIONS_AT_ONCE):
        yield slice(start, min(start + POSITIONS_AT_ONCE, length))


@contextmanager
def _catching(chunk: Any) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        caught.append(output)

    handle = chunk.register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()
