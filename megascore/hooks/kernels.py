"""The few reductions that the hooks share: one pass over an activation, bounded scratch, no host synchronisation.

On a CPU, PyTorch's own reductions over the rows of a matrix are slow for what they do, so rows are copied a little at a
time into a scratch that stays in the cache, transformed there, and added up by products with ones: a batch of one for
each thread, so that a core reads what it has written itself. No compiler is needed. On a GPU one fused reduction reads
the activation once and needs no scratch.

On 2 cores with AVX-512, medians of ``tests/benchmarks/hooks.py``, the sum of absolute values of [2048, 4096] takes a
hook 2.7 ms in float32 (reading it 1.4 ms) and 2.8 ms in bfloat16 (1.0 ms); half of it is ``abs`` into the scratch. One
product for all threads took 1.5 times as long, as did bit masks on int16 views, int32 views of bfloat16 pairs, products
of bfloat16 with ones, and sums instead of products. Where other programs use the cores too, every one of the many short
parallel pieces may have to wait for a thread, and the time is several times that.

Shape letters: S sequence, B samples, T tokens, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "ColumnSum",
    "abs_sum",
    "abs_sum_of_samples",
    "accumulation_dtype",
    "chunks",
    "column_norms",
    "num_tokens",
    "samples_at_once",
    "take_columns",
    "token_views",
]

CPU_SCRATCH_BYTES = 3 << 18
"""Scratch of a reduction on a CPU, for each thread: it must stay in the L2 cache, of which cores have 1 to 2 MB."""
SCRATCH_BYTES = 1 << 25
"""Scratch elsewhere: large enough that kernels are launched rarely."""
_of_thread = threading.local()
MIN_ROWS_AT_ONCE = 16
"""Rows that the scratch should hold where there is a choice: fewer cost more in calls than they save."""
INDEX_BYTES = 1 << 21
"""Room for indices of columns."""
ROWS_AT_ONCE = 256
"""Numbers of one sign that float32 adds one after the other with a relative error of some 3e-7."""
ROWS_OF_PRODUCT = ROWS_AT_ONCE - 16
"""Numbers that a product adds; the others of `ROWS_AT_ONCE` are for adding up several products."""
MAX_PARTS = 16
"""Threads that get scratch and a product of their own: with more, the overhead of each grows faster than the gain."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which activations of ``dtype`` are added up in a chunk: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_at_once(bytes_each: int, device: torch.device) -> int:
    """Return how many rows of ``bytes_each`` bytes the scratch holds; one at least."""
    budget = _cpu_scratch_bytes() if device.type == "cpu" else SCRATCH_BYTES
    return max(1, budget // max(1, bytes_each))


def _num_parts() -> int:
    """Return how many threads of a CPU share a reduction."""
    return min(torch.get_num_threads(), MAX_PARTS)


def _cpu_scratch_bytes() -> int:
    return CPU_SCRATCH_BYTES * max(2, _num_parts())


def chunks(length: int, bytes_each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over ``length`` items of ``bytes_each`` scratch bytes, as many as the scratch holds."""
    step = rows_at_once(bytes_each, device)
    for start in range(0, length, step):
        yield start, min(start + step, length)


def num_tokens(x: Tensor, token_mask: Tensor | None) -> int | Tensor:
    """Return how many tokens of ``x`` [..., C] count: known from the shape, or an int64 tensor from the mask."""
    return x.shape[:-1].numel() if token_mask is None else token_mask.sum()


def token_views(
    tensors: Sequence[Tensor], token_mask: Tensor | None = None
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Yield the tokens of ``tensors`` as matrices [T, features], without copying an activation.

    Args:
        tensors: [..., features], all with the same leading dimensions; any strides.
        token_mask: bool, shape of the leading dimensions.

    Yields:
        One matrix for each tensor, rows of which are the same tokens, and the mask [T] of those tokens. One item if
        the strides allow it (a contiguous tensor, or a transposed one), else one for each index of the shortest
        leading dimension.
    """
    num_leading = tensors[0].dim() - 1
    if num_leading == 0:
        tensors, num_leading = [tensor.unsqueeze(0) for tensor in tensors], 1
        token_mask = None if token_mask is None else token_mask.reshape(1)
    leading = tensors[0].shape[:-1]
    order = sorted(range(num_leading), key=tensors[0].stride, reverse=True)
    ordered = [tensor.permute(*order, num_leading) for tensor in tensors]
    mask = None if token_mask is None else token_mask.reshape(leading).permute(order)
    if all(_leading_dims_merge(tensor) for tensor in ordered):
        yield [tensor.reshape(-1, tensor.shape[-1]) for tensor in ordered], None if mask is None else mask.reshape(-1)
        return
    shortest = min(range(num_leading), key=lambda dim: ordered[0].shape[dim])
    for index in range(ordered[0].shape[shortest]):
        part = None if mask is None else mask.select(shortest, index)
        yield from token_views([tensor.select(shortest, index) for tensor in ordered], part)


def abs_sum(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the sum over all tokens of ``abs(x)``.

    Args:
        x: [..., C], any float dtype, any strides.
        token_mask: bool, shape of ``x`` without channels; tokens where it is False add nothing, whatever they hold.

    Returns:
        [C] float64.
    """
    total = x.new_zeros(x.shape[-1], dtype=torch.float64)
    for (tokens,), mask in token_views([x], token_mask):
        total += _column_sums(tokens, mask, _fill_abs)
    return total


def abs_sum_of_samples(x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the sum over the sequence of ``abs(x)`` for each sample.

    Args:
        x: [S, B, C], any float dtype, any strides.
        token_mask: bool [S, B]; tokens where it is False add nothing, whatever they hold.

    Returns:
        [B, C] float64.
    """
    return _column_sums(x, token_mask, _fill_abs)


def samples_at_once(x: Tensor) -> int:
    """Return how many samples of ``x`` [S, B, C] to give to `abs_sum_of_samples` together: fast, in bounded memory."""
    num_channels = x.shape[-1]
    if x.device.type != "cpu":
        # There the sums are the only temporaries.
        return rows_at_once(num_channels * 8, x.device)
    return rows_at_once(num_channels * accumulation_dtype(x.dtype).itemsize * MIN_ROWS_AT_ONCE, x.device)


def take_columns(matrix: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """Return some columns of ``matrix`` [T, C] in the order of ``columns`` [N] int64, in ``out`` [T, N] or a new one.

    On a CPU, `index_select` copies one number after the other, and `gather` several: two to four times faster, a few
    rows at a time, as it may make an index for each number.
    """
    if matrix.device.type != "cpu":
        return torch.index_select(matrix, 1, columns, out=out)
    taken = matrix.new_empty(len(matrix), len(columns)) if out is None else out
    step = max(1, INDEX_BYTES // (columns.itemsize * max(1, len(columns))))
    index = columns.expand(min(step, len(matrix)), -1)
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        torch.gather(rows, 1, index[: len(rows)], out=taken[start : start + step])
    return taken


def column_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each column of ``weight`` [E, C]: [C] float64."""
    return _column_sums(weight.detach(), None, _fill_square).sqrt()


class ColumnSum:
    """Adds up the columns of matrices that come a few rows at a time.

    On a CPU by products with ones, which add the columns of a row-major matrix faster than `Tensor.sum` does. Each
    thread gets the rows that it has just written when an elementwise operation filled the matrix, for they are in the
    cache of its core: as one product for each thread, in a batch. Products add one number after the other, so float32
    gets no more than `ROWS_AT_ONCE` additions in a chain before float64 takes over.
    """

    def __init__(self, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Start from zero; ``dtype`` is that of the matrices, float32 or float64."""
        self._total = torch.zeros(num_columns, dtype=torch.float64, device=device)
        self._on_cpu = device.type == "cpu"
        self._num_parts = _num_parts() if self._on_cpu else 1
        self._partial = torch.zeros(self._num_parts, 1, num_columns, dtype=dtype, device=device)
        self._ones = self._partial.new_ones(self._num_parts, 1, 1)
        self._chain = 0

    def add(self, matrix: Tensor) -> None:
        """Add the rows of ``matrix`` [T, C], contiguous; it is not kept."""
        if not self._on_cpu:
            self._total += matrix.sum(0)
            return
        num_rows = len(matrix)
        at_once = ROWS_OF_PRODUCT * self._num_parts
        if num_rows > at_once:
            for rows in torch.split(matrix, at_once):
                self.add(rows)
            return
        rows_each, num_left = divmod(num_rows, self._num_parts)
        # The longest product so far, and one addition for each product after it.
        self._chain = max(self._chain, rows_each) + 1 + num_left
        if self._chain > ROWS_AT_ONCE:
            self._flush()
            self._chain = rows_each + 1 + num_left
        if rows_each:
            if self._ones.shape[-1] != rows_each:
                self._ones = self._partial.new_ones(self._num_parts, 1, rows_each)
            even = matrix[: num_rows - num_left] if num_left else matrix
            self._partial.baddbmm_(self._ones, even.view(self._num_parts, rows_each, -1))
        for row in range(num_rows - num_left, num_rows):
            self._partial[0, 0] += matrix[row]

    def result(self) -> Tensor:
        """Return the sum so far: [C] float64."""
        self._flush()
        return self._total

    def _flush(self) -> None:
        # Not in one step: adding two types is an order of magnitude slower than converting one.
        self._total += self._partial.double().sum((0, 1))
        self._partial.zero_()
        self._chain = 0


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized memory; on a CPU the same in each call of a thread, for fresh pages cost time."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or num_bytes > _cpu_scratch_bytes():
        return torch.empty(shape, dtype=dtype, device=device)
    if not hasattr(_of_thread, "buffer") or len(_of_thread.buffer) < num_bytes:
        _of_thread.buffer = torch.empty(_cpu_scratch_bytes(), dtype=torch.uint8)
    buffer: Tensor = _of_thread.buffer
    return buffer[:num_bytes].view(dtype).view(shape)


def _leading_dims_merge(x: Tensor) -> bool:
    """Say whether all dimensions but the last are one dimension of one stride."""
    dims = [dim for dim in range(x.dim() - 1) if x.shape[dim] != 1]
    return x.numel() == 0 or all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in pairwise(dims))


def _fill_abs(scratch: Tensor, x: Tensor) -> None:
    if x.dtype == scratch.dtype:
        torch.abs(x, out=scratch)
    else:
        scratch.copy_(x).abs_()


def _fill_square(scratch: Tensor, x: Tensor) -> None:
    scratch.copy_(x).square_()


def _column_sums(x: Tensor, token_mask: Tensor | None, fill: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Return the sum over the first dimension of ``x`` [T, ...] as ``fill`` transforms it: [...] float64."""
    dtype = accumulation_dtype(x.dtype)
    if x.device.type != "cpu" and token_mask is None and fill is _fill_abs:
        norms: Tensor = torch.linalg.vector_norm(x, 1, dim=0, dtype=dtype)
        return norms.double()
    length, rest = x.shape[0], x.shape[1:]
    if x.numel() == 0:
        return x.new_zeros(rest, dtype=torch.float64)
    total = ColumnSum(rest.numel(), dtype, x.device)
    step = rows_at_once(rest.numel() * dtype.itemsize, x.device)
    scratch = _scratch((min(step, length), *rest), dtype, x.device)
    matrix = scratch.view(len(scratch), -1)
    for number, rows in enumerate(torch.split(x, step)):
        if len(rows) < len(scratch):
            scratch, matrix = scratch[: len(rows)], matrix[: len(rows)]
        fill(scratch, rows)
        if token_mask is not None:
            scratch.masked_fill_(~token_mask[number * step :][: len(rows)].unsqueeze(-1), 0)
        total.add(matrix)
    return total.result().view(rest)
