"""The sum of a matrix's columns, a few rows at a time: on a CPU by products with ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megascore.kernels.workspace import Workspace

__all__ = ["MAX_PARTS", "ColumnSum", "num_parts"]

ROWS_AT_ONCE = 256
"""Numbers of one sign that float32 adds one after the other with a relative error of some 3e-7."""
ROWS_OF_PRODUCT = ROWS_AT_ONCE - 16
"""Numbers that a product adds; the others of `ROWS_AT_ONCE` are for adding up several products."""
MAX_PARTS = 16
"""Threads that get scratch and a product of their own: with more, the overhead of each grows faster than the gain."""


def num_parts() -> int:
    """Return how many threads of a CPU share a reduction."""
    return min(torch.get_num_threads(), MAX_PARTS)


class ColumnSum:
    """Adds up the columns of matrices that come a few rows at a time.

    On a CPU by products with ones, which add the columns of a row-major matrix faster than `Tensor.sum` does. Each
    thread gets the rows that it has just written when an elementwise operation filled the matrix, for they are in the
    cache of its core: as one product for each thread, in a batch. Products add one number after the other, so float32
    gets no more than `ROWS_AT_ONCE` additions in a chain before float64 takes over.
    """

    def __init__(self, num_columns: int, dtype: torch.dtype, device: torch.device, workspace: Workspace) -> None:
        """Start from nothing; ``dtype`` is that of the matrices, float32 or float64."""
        self._num_columns, self._device = num_columns, device
        self._total: Tensor | None = None
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            self._partial = workspace.empty((num_parts(), 1, num_columns), dtype).zero_()
        self._chain = 0

    def add(self, matrix: Tensor) -> None:
        """Add the rows of ``matrix`` [T, C], contiguous; it is not kept."""
        self.adder(matrix)()

    def adder(self, matrix: Tensor) -> Callable[[], None]:
        """Return a function that adds the rows which ``matrix`` [T, C], contiguous, holds at the time of its call.

        For a matrix that is filled again and again: what is the same in each call is prepared once.
        """
        products = self._products(matrix) if self._on_cpu else []

        def add() -> None:
            if not self._on_cpu:
                self._add_to_total(matrix.sum(0))
            for partial, ones, batch in products:
                # The longest product so far, and one addition for each product after it.
                chain = max(self._chain, batch.shape[1]) + 1
                if chain > ROWS_AT_ONCE:
                    self._flush()
                    chain = batch.shape[1] + 1
                partial.baddbmm_(ones, batch)
                self._chain = chain

        return add

    def result(self) -> Tensor:
        """Return the sum so far: [C] float64."""
        if self._chain:
            self._flush()
        if self._total is None:
            return torch.zeros(self._num_columns, dtype=torch.float64, device=self._device)
        return self._total

    def _products(self, matrix: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (partial, ones, batch) of the products that add ``matrix``; a batch has the rows of each thread."""
        num_rows, num_threads = len(matrix), len(self._partial)
        num_even = min(num_rows - num_rows % num_threads, ROWS_OF_PRODUCT * num_threads)
        parts = num_threads if num_even else 1
        num_taken = num_even or num_rows
        batch = matrix[:num_taken].view(parts, -1, self._num_columns)
        ones = _ones(matrix.dtype)[:parts, :, : batch.shape[1]]
        products = [(self._partial[:parts], ones, batch)]
        return products if num_taken == num_rows else products + self._products(matrix[num_taken:])

    def _flush(self) -> None:
        self._add_to_total(self._partial.sum((0, 1), dtype=torch.float64))
        self._partial.zero_()
        self._chain = 0

    def _add_to_total(self, sums: Tensor) -> None:
        self._total = sums.double() if self._total is None else self._total.add_(sums)


@cache
def _ones(dtype: torch.dtype) -> Tensor:
    """Return ones [MAX_PARTS, 1, ROWS_OF_PRODUCT] on the CPU."""
    with torch.inference_mode(False):
        return torch.ones(MAX_PARTS, 1, ROWS_OF_PRODUCT, dtype=dtype, device="cpu")
