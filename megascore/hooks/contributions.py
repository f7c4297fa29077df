"""Contributions of kept channels to a linear layer's output, given the channels that are pruned already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megascore.kernels import reductions
from megascore.kernels.column_sum import ColumnSum
from megascore.kernels.products import Product
from megascore.kernels.workspace import Workspace

__all__ = ["EPSILON", "Contributions"]

EPSILON = 1e-8
"""Added under square roots and to divisors; part of the score's definition."""
TOKENS_AT_ONCE = 1024
"""Enough rows for products at full speed, and for gathering weights to cost little beside them."""
CHUNK_BYTES = 36 << 20
"""Bound on the temporaries of a chunk of tokens: its gathered inputs, and what is as wide as the output."""
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
        multiply = Product(x.dtype, self.weight.dtype, x.device)
        norms = self.weight_norm.to(multiply.dtype)
        with Workspace(x.device) as workspace:
            if self.pruned is None:
                return _sums_with_nothing_pruned(x, norms, mask, workspace)
            return self._sums_with_some_pruned(x, y, mask, multiply, norms, workspace)

    def _sums_with_some_pruned(
        self, x: Tensor, y: Tensor, mask: Tensor | None, multiply: Product, norms: Tensor, workspace: Workspace
    ) -> Tensor:
        assert self.pruned is not None
        # Kept channels first, then pruned ones: one gather of the inputs serves both products.
        order, num_kept = torch.cat([self.kept, self.pruned]), len(self.kept)
        num_outputs, itemsize = y.shape[-1], multiply.dtype.itemsize
        # The step must be the same on all ranks that share the tokens: their shards are of one size.
        bytes_each = max(5 * num_outputs, 2 * x.shape[-1]) * itemsize
        at_once = reductions.bound(CHUNK_BYTES, x.device) // bytes_each
        step = max(1, min(reductions.bound(TOKENS_AT_ONCE, x.device), at_once, len(x)))
        columns = _Columns(self.weight, order, multiply.best_dtypes[1], step, workspace)
        multiply_error = Product(multiply.dtype, self.weight.dtype, x.device)
        square_norms = norms[self.kept].square_()
        total = x.new_zeros(num_kept, dtype=torch.float64)
        gathered = workspace.empty((step, len(order)), multiply.best_dtypes[0])
        residual = workspace.empty((step, num_outputs), multiply.dtype)
        cross = workspace.empty((step * min(num_kept, columns.num_at_once),), multiply.dtype)
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            inputs = reductions.take_columns(x[some], order, gathered[: len(x[some])])
            error = self._error(inputs, y[some], columns, num_kept, multiply, residual[: len(inputs)])
            squares = torch.linalg.vector_norm(error, dim=-1).square_().add_(EPSILON)
            error *= 2
            part_mask = None if mask is None else mask[some]
            for first, last in columns.blocks(0, num_kept):
                size = (len(inputs), last - first)
                product = multiply_error(error, columns[first:last], cross[: prod(size)].view(size))
                kept_inputs = inputs[:, first:last].to(multiply.dtype)
                sums = _sums_of_block(kept_inputs, product, squares, square_norms[first:last], part_mask)
                total[first:last] += sums
        return total

    def _error(
        self, inputs: Tensor, y: Tensor, columns: _Columns, num_kept: int, multiply: Product, out: Tensor
    ) -> Tensor:
        """Return s [T, E], the output's error when nothing more is pruned; may be in ``out``, of its shape."""
        residual: Tensor | None = None
        for first, last in columns.blocks(num_kept, inputs.shape[1]):
            factors = inputs[:, first:last], columns[first:last].mT
            residual = multiply(*factors, out if residual is None else residual, accumulate=residual is not None)
        if residual is None:
            # Channels are pruned, but none of this rank's.
            residual = out.zero_()
        residual = self.reduce_over_shards(residual)
        if self.calibration_method is None:
            return residual
        whole = y.to(residual.dtype)
        if self.bias is not None:
            whole = whole - self.bias.to(residual.dtype)
        left = torch.sub(whole, residual, out=residual)
        scale = torch.linalg.vector_norm(left, dim=-1) / (torch.linalg.vector_norm(whole, dim=-1) + EPSILON)
        return torch.addcmul(left.neg_(), scale.unsqueeze(-1), whole, out=left)


class _Columns:
    """The columns of a weight [E, C] in another order: gathered once where they are small, else block by block."""

    def __init__(
        self, weight: Tensor, order: Tensor, dtype: torch.dtype, num_tokens: int, workspace: Workspace
    ) -> None:
        """Keep columns in ``dtype``, for products with ``num_tokens`` tokens."""
        self._order, self._weight = order, weight
        # In float32: a product in two parts, its sum and the inputs; and the block itself, and a library's copy of it.
        block_bytes = reductions.bound(BLOCK_BYTES, weight.device)
        at_once = block_bytes // (16 * num_tokens)
        self._gathered: Tensor | None = None
        if weight.numel() * 4 <= block_bytes:
            self._gathered = reductions.take_columns(weight, order, workspace.empty((len(weight), len(order)), dtype))
        else:
            at_once = min(at_once, block_bytes // (8 * len(weight)))
            self._memory = workspace.empty((max(1, at_once) * len(weight),), dtype)
        self.num_at_once = max(1, at_once)
        """Columns of a block, at most."""

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last) of blocks of the columns from start to stop."""
        for first in range(start, stop, self.num_at_once):
            yield first, min(first + self.num_at_once, stop)

    def __getitem__(self, block: slice) -> Tensor:
        """Return columns [E, N] of a block, until the next one is asked for."""
        if self._gathered is not None:
            return self._gathered[:, block]
        order = self._order[block]
        size = (len(self._weight), len(order))
        return reductions.take_columns(self._weight, order, self._memory[: prod(size)].view(size))


def _sums_of_block(inputs: Tensor, cross: Tensor, squares: Tensor, square_norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over tokens of ``sqrt(max(0, norm2(s)^2 + x (2 s . W + x norm2(W)^2)) + EPSILON)``: [K].

    Args:
        inputs: x [T, K].
        cross: 2 s . W [T, K]; overwritten.
        squares: norm2(s)^2 + EPSILON [T].
        square_norms: norm2(W)^2 [K].
        mask: bool [T].
    """
    with Workspace(inputs.device) as workspace:
        total = ColumnSum(inputs.shape[1], inputs.dtype, inputs.device, workspace)
        for start, stop in reductions.chunks(len(inputs), 2 * inputs.shape[1] * inputs.itemsize, inputs.device):
            x, value = inputs[start:stop], cross[start:stop]
            value.addcmul_(x, square_norms)
            torch.addcmul(squares[start:stop, None], value, x, out=value)
            # max(0, v) + EPSILON, EPSILON being in v already: rounding can make v negative where the terms cancel.
            value.clamp_(min=EPSILON).sqrt_()
            if mask is not None:
                value.masked_fill_(~mask[start:stop, None], 0)
            total.add(value)
        return total.result()


def _sums_with_nothing_pruned(x: Tensor, norms: Tensor, mask: Tensor | None, workspace: Workspace) -> Tensor:
    """Return the sums over tokens of ``sqrt((x norm2(W))^2 + EPSILON)``: [C] float64."""
    num_tokens, num_channels = x.shape
    total = ColumnSum(num_channels, norms.dtype, x.device, workspace)
    # Filled on its device: made from a number of the host it would have to wait for a copy.
    epsilon = norms.new_full((), EPSILON)
    square_norms = norms.square()
    step = reductions.rows_at_once(num_channels * norms.itemsize, x.device)
    scratch = workspace.empty((min(step, num_tokens), num_channels), norms.dtype)
    for start in range(0, num_tokens, step):
        rows = x[start : start + step]
        value = scratch[: len(rows)]
        if rows.dtype == value.dtype:
            torch.mul(rows, rows, out=value)
        else:
            value.copy_(rows).square_()
        torch.addcmul(epsilon, value, square_norms, out=value).sqrt_()
        if mask is not None:
            value.masked_fill_(~mask[start : start + step, None], 0)
        total.add(value)
    return total.result()
