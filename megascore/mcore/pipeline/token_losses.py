"""Next-token losses of logits whose vocabulary and sequences are split over ranks, and their gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.mcore.world.context_parallel import local_positions

__all__ = ["Predictions", "loss_gradient", "token_losses"]


class Predictions:
    """What a context-parallel rank's tokens are to predict: the token behind each, in whole sequences."""

    def __init__(self, tokens: Tensor, mask: Tensor | None, device: torch.device) -> None:
        """Find them, without waiting for the device.

        Args:
            tokens: [B, S] int64, whole sequences, on the device.
            mask: Which of them count, bool [B, S], best in host memory; None: all.
            device: The device.
        """
        rank = parallel_state.get_context_parallel_rank()
        size = parallel_state.get_context_parallel_world_size()
        positions = local_positions(tokens.shape[1], rank, size, device)
        self.length = len(positions) - (rank == 0)
        """How many of this rank's tokens, from its first, predict one: the last token of a sequence, the last one of
        the first rank, has none after it."""
        self.labels = tokens[:, positions[: self.length] + 1]
        """[B, length] int64."""
        self.counted: Tensor | None = None
        """Which of the labels count, bool [B, length] on the device; None: all."""
        self.num_counted: int = self.labels.numel()
        """How many count."""
        if mask is not None:
            # The mask is in host memory, and so are its indices.
            own_positions = local_positions(tokens.shape[1], rank, size, mask.device)
            counted = mask[:, own_positions[: self.length] + 1]
            self.counted = counted.to(device, non_blocking=True)
            self.num_counted = int(counted.sum())


def token_losses(local_logits: Tensor, labels: Tensor, vocab_size: int | None = None) -> Tensor:
    """Cross entropy of logits whose vocabulary is split over the tensor-parallel ranks.

    Megatron's own goes through float32; this one leaves float64 as it is. Collective over the tensor axis.

    Args:
        local_logits: [B, S, V / TP].
        labels: [B, S] int64 token numbers.
        vocab_size: How many of the V entries are tokens, the same on all ranks; those behind them pad the vocabulary
            to a multiple of TP, and have no part in the loss. None: all are.

    Returns:
        [B, S] nats, float32 or float64, the same on all tensor-parallel ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    logits = _shifted(local_logits, vocab_size)
    local_labels, is_here = _own_labels(labels, logits.shape[-1])
    picked = logits.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1)
    sums = torch.stack([logits.exp().sum(dim=-1), picked.where(is_here, 0.0)])
    dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1]


def loss_gradient(local_logits: Tensor, tokens: Tensor, mask: Tensor | None, vocab_size: int | None = None) -> Tensor:
    """Return the gradient of the nats of all predicted tokens that count, added up. Collective over the tensor axis.

    Args:
        local_logits: [B, S / CP, V / TP], those of this rank's tokens.
        tokens: [B, S] int64, whole sequences.
        mask: Which tokens count, bool [B, S], best in host memory; None: all.
        vocab_size: As of `token_losses`.

    Returns:
        The shape and dtype of ``local_logits``: softmax less one at the token that follows; zeros where nothing that
        counts is predicted.
    """
    predictions = Predictions(tokens.to(local_logits.device), mask, local_logits.device)
    gradient = torch.zeros_like(local_logits)
    # The softmax of one micro-batch; memory as that of the loss itself.
    weights = _shifted(local_logits[:, : predictions.length], vocab_size).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    weights /= total
    local_labels, is_here = _own_labels(predictions.labels, weights.shape[-1])
    weights.scatter_add_(-1, local_labels.unsqueeze(-1), -is_here.unsqueeze(-1).to(weights.dtype))
    if predictions.counted is not None:
        weights.masked_fill_(~predictions.counted.unsqueeze(-1), 0)
    gradient[:, : predictions.length] = weights
    return gradient


def _shifted(local_logits: Tensor, vocab_size: int | None) -> Tensor:
    """Return logits less the largest of their token, those of no token -inf; a copy, float32 or float64."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = local_logits if local_logits.dtype == torch.float64 else local_logits.float()
    local_size = logits.shape[-1]
    num_tokens = local_size if vocab_size is None else vocab_size - dist.get_rank(group) * local_size
    if num_tokens < local_size:
        is_padding = torch.arange(local_size, device=logits.device) >= num_tokens
        logits = logits.masked_fill(is_padding, -torch.inf)
    largest = logits.amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return logits - largest.unsqueeze(-1)


def _own_labels(labels: Tensor, local_size: int) -> tuple[Tensor, Tensor]:
    """Return labels as numbers of this rank's part of the vocabulary, 0 for those of others, and which are its own."""
    local_labels = labels - dist.get_rank(parallel_state.get_tensor_model_parallel_group()) * local_size
    is_here = (local_labels >= 0) & (local_labels < local_size)
    return local_labels.where(is_here, 0), is_here
