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
TOKENS_AT_ONCE = 512
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
        # Kept channels first, then pruned ones: one gather of the inputs serves both products.
        order, num_kept = torch.cat([self.kept, self.pruned]), len(self.kept)
        columns = _Columns(self.weight, order)
        square_norms = norms[self.kept].square_()
        # The step must be the same on all ranks that share the tokens: their shards are of one size.
        bytes_each = max(5 * y.shape[-1] * dtype.itemsize, 2 * x.shape[-1] * dtype.itemsize)
        step = max(1, min(TOKENS_AT_ONCE, CHUNK_BYTES // bytes_each))
        # One for all chunks: fresh pages cost time.
        buffer = x.new_empty(min(step, len(x)), len(order))
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            inputs = kernels.take_columns(x[some], order, out=buffer[: len(x[some])])
            error = self._error(inputs, y[some], columns, num_kept)
            squares = torch.linalg.vector_norm(error, dim=-1).square_().add_(EPSILON)
            error *= 2
            part_mask = None if mask is None else mask[some]
            for first, last in columns.blocks(0, num_kept, step):
                cross = product(error, columns[first:last])
                kept_inputs = inputs[:, first:last].to(dtype)
                sums = _sums_of_block(kept_inputs, cross, squares, square_norms[first:last], part_mask)
                total[first:last] += sums
        return total

    def _error(self, inputs: Tensor, y: Tensor, columns: _Columns, num_kept: int) -> Tensor:
        """Return s [T, E], the output's error when nothing more is pruned."""
        dtype = torch.promote_types(kernels.accumulation_dtype(y.dtype), kernels.accumulation_dtype(self.weight.dtype))
        residual: Tensor | None = None
        for first, last in columns.blocks(num_kept, inputs.shape[1], len(inputs)):
            part = product(inputs[:, first:last], columns[first:last].mT).to(dtype)
            residual = part if residual is None else residual.add_(part)
        if residual is None:
            # Channels are pruned, but none of this rank's.
            residual = inputs.new_zeros(y.shape, dtype=dtype)
        residual = self.reduce_over_shards(residual)
        if self.calibration_method is None:
            return residual
        whole = y.to(dtype) if self.bias is None else y.to(dtype) - self.bias.to(dtype)
        left = whole - residual
        scale = torch.linalg.vector_norm(left, dim=-1) / (torch.linalg.vector_norm(whole, dim=-1) + EPSILON)
        return torch.addcmul(left.neg_(), scale.unsqueeze(-1), whole)


class _Columns:
    """The columns of a weight [E, C] in another order: gathered once where they are small, else block by block."""

    def __init__(self, weight: Tensor, order: Tensor) -> None:
        self._order = order
        self._weight = weight
        self._gathered = kernels.take_columns(weight, order) if weight.numel() * 4 <= BLOCK_BYTES else None

    def blocks(self, start: int, stop: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of blocks of the columns from start to stop, for products with ``num_tokens`` tokens."""
        # In float32: a product in two parts, its sum and the inputs; and the block itself, and a library's copy of it.
        widths = [BLOCK_BYTES // (16 * max(1, num_tokens))]
        if self._gathered is None:
            widths.append(BLOCK_BYTES // (8 * self._weight.shape[0]))
        step = max(1, min(widths))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def __getitem__(self, block: slice) -> Tensor:
        """Return columns [E, N] of a block."""
        if self._gathered is not None:
            return self._gathered[:, block]
        return kernels.take_columns(self._weight, self._order[block])


def _sums_of_block(inputs: Tensor, cross: Tensor, squares: Tensor, square_norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over tokens of ``sqrt(max(0, norm2(s)^2 + x (2 s . W + x norm2(W)^2)) + EPSILON)``: [K].

    Args:
        inputs: x [T, K].
        cross: 2 s . W [T, K]; overwritten.
        squares: norm2(s)^2 + EPSILON [T].
        square_norms: norm2(W)^2 [K].
        mask: bool [T].
    """
    total = kernels.ColumnSum(inputs.shape[1], inputs.dtype, inputs.device)
    for start, stop in kernels.chunks(len(inputs), 2 * inputs.shape[1] * inputs.itemsize, inputs.device):
        x, value = inputs[start:stop], cross[start:stop]
        value.addcmul_(x, square_norms)
        torch.addcmul(squares[start:stop, None], value, x, out=value)
        # max(0, v) + EPSILON, EPSILON being in v already: rounding can make v negative where the terms cancel.
        value.clamp_(min=EPSILON).sqrt_()
        if mask is not None:
            value.masked_fill_(~mask[start:stop, None], 0)
        total.add(value)
    return total.result()


def _sums_with_nothing_pruned(x: Tensor, norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over tokens of ``sqrt((x norm2(W))^2 + EPSILON)``: [C] float64."""
    total = kernels.ColumnSum(x.shape[1], norms.dtype, x.device)
    # Filled on its device: made from a number of the host it would have to wait for a copy.
    epsilon = norms.new_full((), EPSILON)
    for start, stop in kernels.chunks(len(x), x.shape[1] * norms.itemsize, x.device):
        value = x[start:stop].to(norms.dtype) * norms
        torch.addcmul(epsilon, value, value, out=value).sqrt_()
        if mask is not None:
            value.masked_fill_(~mask[start:stop, None], 0)
        total.add(value)
    return total.result()
