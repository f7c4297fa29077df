"""Sums over pairs of tokens, one of each of two activations of one shape, with bounded scratch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megascore.kernels import reductions
from megascore.kernels.fused_cosines import can_fuse, cosines

__all__ = ["sum_of_cosines", "sum_of_squared_differences", "sum_of_squares"]

COPIES = 3
"""Scratch for each pair of rows: a copy of each side, and one product."""


def sum_of_cosines(before: Tensor, after: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the sum over tokens of the cosine of ``before`` and ``after``: [] float64.

    A token of which one side is all zeros has cosine 0.

    Args:
        before: [..., C], any float dtype, any strides.
        after: The same shape.
        token_mask: bool [...]; tokens where it is False add nothing, whatever they hold. None counts all.
    """
    total = before.new_zeros((), dtype=torch.float64)
    for (x, y), mask in reductions.token_views([before, after], token_mask):
        if not can_fuse(x, y):
            total += _sum(_cosines, x, y, mask)
            continue
        values = cosines(x, y)
        total += (values if mask is None else values.masked_fill_(~mask, 0)).sum(dtype=torch.float64)
    return total


def sum_of_squared_differences(before: Tensor, after: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the sum over tokens of ``|before - after|^2``: [] float64. Arguments as of `sum_of_cosines`."""
    return _sum(lambda x, y: (x - y).square_().sum(-1), before, after, token_mask)


def sum_of_squares(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the sum over tokens of ``|x|^2``: [] float64. Arguments as of `sum_of_cosines`."""
    return _sum(lambda one, _: one.square().sum(-1), x, x, token_mask)


def _sum(
    of_rows: Callable[[Tensor, Tensor], Tensor], before: Tensor, after: Tensor, token_mask: Tensor | None
) -> Tensor:
    total = before.new_zeros((), dtype=torch.float64)
    dtype = reductions.accumulation_dtype(before.dtype)
    bytes_each = COPIES * before.shape[-1] * dtype.itemsize
    for (x, y), mask in reductions.token_views([before, after], token_mask):
        for start, stop in reductions.chunks(len(x), bytes_each, before.device):
            values = of_rows(x[start:stop].to(dtype), y[start:stop].to(dtype))
            if mask is not None:
                values = values.masked_fill(~mask[start:stop], 0)
            total += values.sum(dtype=torch.float64)
    return total


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row of ``x`` [T, H] with that of ``y``: [T]; 0 where one of them is all zeros."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosines: Tensor = (x * y).sum(-1) / norms.clamp(min=torch.finfo(x.dtype).tiny)
    return cosines
