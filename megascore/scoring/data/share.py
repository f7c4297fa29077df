"""From the rank that read the samples to all others."""

from __future__ import annotations

from dataclasses import replace

import torch

from megascore.parallel.comm import broadcast_object, broadcast_tensor
from megascore.scoring.data.samples import Samples

__all__ = ["share_samples"]


def share_samples(samples: Samples | None) -> Samples:
    """Return rank 0's samples on every rank, in host memory.

    Collective over the world; ranks other than 0 bring None. Tokens go as tensors, a piece at a time, and one byte for
    each entry of a mask.
    """
    nothing = torch.empty(0)
    masks = None if samples is None else samples.masks
    header = None if samples is None else replace(samples, tokens=nothing, masks=None if masks is None else nothing)
    header = broadcast_object(header)
    assert header is not None
    tokens = broadcast_tensor(None if samples is None else samples.tokens)
    if header.masks is None:
        return replace(header, tokens=tokens)
    return replace(header, tokens=tokens, masks=broadcast_tensor(None if masks is None else masks.byte()).bool())
