"""Two models' predictions for the same tokens, compared where the logits are: on the ranks of the last stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
"""Whole vocabularies in float64 are large: so many positions of a sample are compared at a time."""


class Predictions(NamedTuple):
    """One model's logits for a micro-batch, on a rank that has them."""

    logits: Tensor
    """[B, S, V / TP], of this context-parallel rank's positions."""
    vocab_size: int | None
    """How many of the V entries are tokens; None: all."""


@torch.no_grad()
def predictions(chunks: Sequence[Any], tokens: Tensor) -> Predictions | None:
    """Run one micro-batch and return its logits; None on ranks that do not have them.

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
    return Predictions(caught[0], getattr(chunks[-1], "vocab_size", None))


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
    device = one.logits.device
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    positions = local_positions(tokens.shape[1], rank, size, device)
    # The last token of a sequence, the last one of the first context-parallel rank, has none after it to predict.
    num_predicting = len(positions) - (rank == 0)
    following = positions[:num_predicting] + 1
    labels = tokens[:, following]
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.to(device)[:, following]
    sums = torch.zeros(len(tokens), len(PAIR_SUMS), dtype=torch.float64, device=device)
    for start in range(0, num_predicting, POSITIONS_AT_ONCE):
        part = slice(start, min(start + POSITIONS_AT_ONCE, num_predicting))
        first, second = _LogProbabilities(one, part), _LogProbabilities(other, part)
        values = torch.stack(
            [
                torch.ones_like(labels[:, part], dtype=torch.float64),
                first.nats(labels[:, part]),
                second.nats(labels[:, part]),
                _summed(first.values.exp() * (first.finite() - second.finite())),
                (first.best() == second.best()).double(),
                _summed(torch.minimum(first.values, second.values).exp()),
            ],
            dim=-1,
        )
        sums += (values * counted[:, part].unsqueeze(-1)).sum(1)
    return sums


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


class _LogProbabilities:
    """Log-probabilities of some positions, [B, s, V / TP] float64, over a vocabulary that is split over ranks."""

    def __init__(self, predictions: Predictions, part: slice) -> None:
        self._group = parallel_state.get_tensor_model_parallel_group()
        logits = predictions.logits[:, part].double()
        size = logits.shape[-1]
        self._offset = dist.get_rank(self._group) * size
        self._is_token = torch.ones(size, dtype=torch.bool, device=logits.device)
        if predictions.vocab_size is not None:
            self._is_token = torch.arange(self._offset, self._offset + size, device=logits.device)
            self._is_token = self._is_token < predictions.vocab_size
            logits = logits.masked_fill(~self._is_token, -torch.inf)
        self._largest = logits.amax(-1)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=self._group)
        self._own_largest, self._own_best = logits.max(-1)
        logits = logits - self._largest.unsqueeze(-1)
        self.values = logits - _summed(logits.exp()).log().unsqueeze(-1)
        """-inf where there is no token."""

    def finite(self) -> Tensor:
        """Return the values with zeros where there is no token."""
        return self.values.masked_fill(~self._is_token, 0.0)

    def nats(self, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood of labels [B, s]."""
        local = labels - self._offset
        is_here = (local >= 0) & (local < self.values.shape[-1])
        picked = self.values.gather(-1, local.where(is_here, 0).unsqueeze(-1)).squeeze(-1)
        return -_sum_over_ranks(picked.where(is_here, 0.0))

    def best(self) -> Tensor:
        """Return the most likely token [B, s]; of equal ones that with the smaller number, whatever the layout."""
        none = torch.iinfo(torch.int64).max
        best = (self._own_best + self._offset).where(self._own_largest == self._largest, none)
        dist.all_reduce(best, op=dist.ReduceOp.MIN, group=self._group)
        return best


def _summed(values: Tensor) -> Tensor:
    """Return the sum over the whole vocabulary. Collective over the tensor axis."""
    return _sum_over_ranks(values.sum(-1))


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())
    return values
