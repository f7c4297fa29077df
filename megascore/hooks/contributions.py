"""What each kept channel contributes to a linear layer's output, given the channels that are pruned already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megascore.hooks import kernels
from megascore.hooks.products import product

__all__ = ["EPSILON", "Contributions"]

EPSILON = 1e-8
"""Added under square roots and to divisors; part of the score's definition."""
TOKENS_AT_ONCE = 1024
"""Enough rows for products at full speed, and for gathering weights to cost little beside them."""
CHUNK_BYTES = 24 << 20
"""Bound on the temporaries of a chunk of tokens that are as wide as the output."""
BLOCK_BYTES = 16 << 20
"""Bound on the temporaries of a block of kept channels, and on gathered columns of the weight."""


@dataclass(frozen=True)
class Contributions:
    """The contributions of one call, summed over tokens.

    With P the pruned channels, r_t = sum over p in P of x[t, p] W[:, p], and s_t = r_t or, calibrated by magnitude,
    k_t y_t - (y_t - r_t), a kept channel c contributes
    ``sqrt(max(0, norm2(s_t)^2 + 2 x[t, c] (s_t . W[:, c]) + x[t, c]^2 norm2(W[:, c])^2) + EPSILON)``.

    Only x of pruned channels and W of kept channels are multiplied. With nothing pruned s is 0 (calibrated, its norm is
    below EPSILON, which moves a contribution by no more), and nothing is.
    """

    weight: Tensor
    """[E, C]."""
    bias: Tensor | None
    """[E], contained in the output, or None."""
    pruned: Tensor | None
    """[P] int64; None where nothing is pruned, on any rank."""
    kept: Tensor
    """[K] int64."""
    weight_norm: Tensor
    """[C], norms of the weight's columns."""
    calibration_method: str | None
    reduce_over_shards: Callable[[Tensor], Tensor]
    """Adds up r of a chunk of tokens over the ranks that hold other channels."""

    def sums(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the sum over tokens of each kept channel's contribution.

        Args:
            x: Input [T, C].
            y: Output [T, E].
            mask: bool [T].

        Returns:
            [K] float64.
        """
        dtype = torch.promote_types(kernels.accumulation_dtype(x.dtype), kernels.accumulation_dtype(self.weight.dtype))
        total = x.new_zeros(len(self.kept), dtype=torch.float64)
        norms = self.weight_norm.to(dtype)
        if self.pruned is None:
            return total + _sums_with_nothing_pruned(x, norms, mask)
        kept_columns, pruned_columns = _Columns(self.weight, self.kept), _Columns(self.weight, self.pruned)
        # The step must be the same on all ranks that share the tokens, so it depends on the output's width alone.
        step = max(1, min(TOKENS_AT_ONCE, CHUNK_BYTES // (5 * y.shape[-1] * dtype.itemsize)))
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            error = self._error(x[some], y[some], pruned_columns, dtype)
            squares = torch.linalg.vector_norm(error, dim=-1).square_().add_(EPSILON)
            error *= 2
            for first, last in kept_columns.blocks(step):
                cross = product(error, kept_columns[first:last])
                inputs = x[some].index_select(1, self.kept[first:last]).to(dtype)
                block_norms = norms[self.kept[first:last]].square()
                part_mask = None if mask is None else mask[some]
                total[first:last] += _sums_of_block(inputs, cross, squares, block_norms, part_mask)
        return total

    def _error(self, x: Tensor, y: Tensor, pruned_columns: _Columns, dtype: torch.dtype) -> Tensor:
        """Return s [T, E], the output's error when nothing more is pruned."""
        residual = x.new_zeros(y.shape, dtype=dtype)
        for first, last in pruned_columns.blocks(len(x)):
            residual += product(x.index_select(1, pruned_columns.index[first:last]), pruned_columns[first:last].mT)
        residual = self.reduce_over_shards(residual)
        if self.calibration_method is None:
            return residual
        whole = y.to(dtype) if self.bias is None else y.to(dtype) - self.bias.to(dtype)
        left = whole - residual
        scale = torch.linalg.vector_norm(left, dim=-1) / (torch.linalg.vector_norm(whole, dim=-1) + EPSILON)
        return torch.addcmul(left.neg_(), scale.unsqueeze(-1), whole)


class _Columns:
    """Some columns of a weight [E, C]: gathered once where they are small, block by block where they are not."""

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        self.index = index
        self._weight = weight
        fits = weight.numel() * 4 <= BLOCK_BYTES
        self._gathered = weight.index_select(1, index) if fits else None

    def blocks(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of blocks of columns, for products with ``num_tokens`` tokens."""
        num_outputs = self._weight.shape[0]
        # In float32: a product in two parts, its sum and the inputs; and the block itself, and a library's copy of it.
        widths = [BLOCK_BYTES // (16 * max(1, num_tokens))]
        if self._gathered is None:
            widths.append(BLOCK_BYTES // (8 * num_outputs))
        step = max(1, min(widths))
        for first in range(0, len(self.index), step):
            yield first, min(first + step, len(self.index))

    def __getitem__(self, block: slice) -> Tensor:
        """Return columns [E, N] of a block."""
        if self._gathered is not None:
            return self._gathered[:, block]
        return self._weight.index_select(1, self.index[block])


def _sums_of_block(inputs: Tensor, cross: Tensor, squares: Tensor, square_norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over tokens of ``sqrt(max(0, norm2(s)^2 + x (2 s . W + x norm2(W)^2)) + EPSILON)``: [K].

    Args:
        inputs: x [T, K].
        cross: 2 s . W [T, K]; overwritten.
        squares: norm2(s)^2 + EPSILON [T].
        square_norms: norm2(W)^2 [K].
        mask: bool [T].
    """
    total = inputs.new_zeros(inputs.shape[1], dtype=torch.float64)
    for start, stop in kernels.chunks(len(inputs), 2 * inputs.shape[1] * inputs.itemsize, inputs.device):
        x, value = inputs[start:stop], cross[start:stop]
        value.addcmul_(x, square_norms)
        torch.addcmul(squares[start:stop, None], value, x, out=value)
        # max(0, v) + EPSILON, EPSILON being in v already: rounding can make v negative where the terms cancel.
        value.clamp_(min=EPSILON).sqrt_()
        if mask is not None:
            value.masked_fill_(~mask[start:stop, None], 0)
        total += kernels.row_sum(value)
    return total


def _sums_with_nothing_pruned(x: Tensor, norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over tokens of ``sqrt((x norm2(W))^2 + EPSILON)``: [C] float64."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    epsilon = norms.new_tensor(EPSILON)
    for start, stop in kernels.chunks(len(x), x.shape[1] * norms.itemsize, x.device):
        value = x[start:stop].to(norms.dtype) * norms
        torch.addcmul(epsilon, value, value, out=value).sqrt_()
        if mask is not None:
            value.masked_fill_(~mask[start:stop, None], 0)
        total += kernels.row_sum(value)
    return total
