"""The few reductions that the hooks share: one pass over an activation, bounded scratch, no host synchronisation.

On a CPU, PyTorch's own reductions over the rows of a matrix are slow for what they do, so rows are copied a little at a
time into a scratch that stays in the cache, transformed there, and added up by products with ones: a batch of one for
each thread, so that a core reads what it has written itself. No compiler is needed. On a GPU one fused reduction reads
the activation once and needs no scratch.

On 2 cores with AVX-512, medians of ``tests/benchmarks/hooks.py``, the sum of absolute values of [2048, 4096] takes a
hook 2.8 ms in float32 (reading it 1.2 to 1.5 ms) and 2.6 ms in bfloat16 (1.1 ms), of which the two operations alone
take 2.4 and 2.2; three quarters of that is ``abs`` into the scratch, from memory. One product for all threads took 1.5
times as long or more, as did bit masks on int16 views, int32 views of bfloat16 pairs, products of bfloat16 with ones,
the backward pass of a norm layer, and sums instead of products. Where other programs use the cores too, every one of
the many short parallel pieces may have to wait for a thread, and the time is several times that.

Shape letters: S sequence, B samples, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor

from megascore.kernels.column_sum import ColumnSum, num_parts
from megascore.kernels.exact import unrounded
from megascore.kernels.workspace import Workspace

__all__ = [
    "Moment",
    "abs_sum",
    "accumulation_dtype",
    "bound",
    "chunks",
    "column_norms",
    "moments",
    "moments_of_samples",
    "num_tokens",
    "rows_at_once",
    "samples_at_once",
    "take_columns",
    "token_views",
]

CPU_SCRATCH_BYTES = 3 << 18
"""Scratch of a reduction on a CPU, for each thread: it must stay in the L2 cache, of which cores have 1 to 2 MB."""
SCRATCH_BYTES = 1 << 25
"""Scratch elsewhere: large enough that kernels are launched rarely."""
ELSEWHERE_FACTOR = 8
"""How much larger bounds are elsewhere than on a CPU, where they keep temporaries in a cache: thousands of launches of
small kernels would take longer than the model's own layer."""
MIN_ROWS_AT_ONCE = 16
"""Rows that the scratch should hold where there is a choice: fewer cost more in calls than they save."""
INDEX_BYTES = 1 << 21
"""Room for indices of columns."""


class Moment(Enum):
    """What is added up over tokens, of each number ``x``."""

    ABS = "abs(x)"
    VALUE = "x"
    SQUARE = "x ** 2"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which activations of ``dtype`` are added up in a chunk: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(amount: int, device: torch.device) -> int:
    """Return what ``amount`` of memory or rows at a time on a CPU becomes on ``device``."""
    return amount if device.type == "cpu" else amount * ELSEWHERE_FACTOR


def rows_at_once(bytes_each: int, device: torch.device) -> int:
    """Return how many rows of ``bytes_each`` bytes the scratch holds; one at least, and as many for each thread."""
    if device.type != "cpu":
        return max(1, SCRATCH_BYTES // max(1, bytes_each))
    parts = num_parts()
    step = CPU_SCRATCH_BYTES * max(2, parts) // max(1, bytes_each)
    return max(1, step - step % parts if step > parts else step)


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
    """Return the sum over all tokens of ``abs(x)``, [C] float64; see `moments`."""
    return moments(x, token_mask, (Moment.ABS,))[0]


def moments(x: Tensor, token_mask: Tensor | None, kinds: Sequence[Moment]) -> list[Tensor]:
    """Return sums over all tokens of ``abs(x)``, ``x`` or ``x ** 2``, from one pass over the activation on a CPU.

    Args:
        x: [..., C], any float dtype, any strides.
        token_mask: bool, shape of ``x`` without channels; tokens where it is False add nothing, whatever they hold.
        kinds: What is added up.

    Returns:
        For each kind [C] float64.
    """
    if token_mask is None and x.is_contiguous():
        # What `token_views` finds, too, but this is where a call's time goes.
        return _column_sums(x.view(x.shape[:-1].numel(), x.shape[-1]), None, kinds)
    totals = [x.new_zeros(x.shape[-1], dtype=torch.float64) for _ in kinds]
    for (tokens,), mask in token_views([x], token_mask):
        for total, sums in zip(totals, _column_sums(tokens, mask, kinds), strict=True):
            total += sums
    return totals


def moments_of_samples(x: Tensor, token_mask: Tensor | None, kinds: Sequence[Moment]) -> list[Tensor]:
    """Return sums over the sequence of ``abs(x)``, ``x`` or ``x ** 2`` for each sample.

    Args:
        x: [S, B, C], any float dtype, any strides.
        token_mask: bool [S, B]; tokens where it is False add nothing, whatever they hold.
        kinds: What is added up.

    Returns:
        For each kind [B, C] float64.
    """
    return _column_sums(x, token_mask, kinds)


def samples_at_once(x: Tensor) -> int:
    """Return how many samples of ``x`` [S, B, C] to give to `moments_of_samples` together: fast, in bounded memory."""
    num_channels = x.shape[-1]
    if x.device.type != "cpu":
        # There the sums are the only temporaries.
        return rows_at_once(num_channels * 8, x.device)
    return rows_at_once(num_channels * accumulation_dtype(x.dtype).itemsize * MIN_ROWS_AT_ONCE, x.device)


def take_columns(matrix: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Write some columns of ``matrix`` [T, C], in the order of ``columns`` [N] int64, to ``out`` [T, N] and return it.

    On a CPU, `index_select` copies one number after the other, and `gather` several: two to four times faster, a few
    rows at a time, as it may make an index for each number. ``out`` may be of a wider type.
    """
    if matrix.device.type != "cpu":
        if out.dtype != matrix.dtype:
            return out.copy_(matrix.index_select(1, columns))
        return torch.index_select(matrix, 1, columns, out=out)
    step = min(len(matrix), max(1, INDEX_BYTES // (columns.itemsize * max(1, len(columns)))))
    index = columns.expand(step, -1)
    with Workspace(matrix.device) as workspace:
        narrow = None if out.dtype == matrix.dtype else workspace.empty((step, len(columns)), matrix.dtype)
        for start in range(0, len(matrix), step):
            rows, taken = matrix[start : start + step], out[start : start + step]
            if narrow is None:
                torch.gather(rows, 1, index[: len(rows)], out=taken)
            else:
                taken.copy_(torch.gather(rows, 1, index[: len(rows)], out=narrow[: len(rows)]))
    return out


def column_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each column of ``weight`` [E, C]: [C] float64."""
    with unrounded(weight.device):
        return _column_sums(weight.detach(), None, (Moment.SQUARE,))[0].sqrt()


def _leading_dims_merge(x: Tensor) -> bool:
    """Say whether all dimensions but the last are one dimension of one stride."""
    dims = [dim for dim in range(x.dim() - 1) if x.shape[dim] != 1]
    return x.numel() == 0 or all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in pairwise(dims))


def _fill_abs(scratch: Tensor, x: Tensor) -> None:
    if x.dtype == scratch.dtype:
        torch.abs(x, out=scratch)
    else:
        scratch.copy_(x).abs_()


def _fill_value(scratch: Tensor, x: Tensor) -> None:
    scratch.copy_(x)


def _fill_square(scratch: Tensor, x: Tensor) -> None:
    if x.dtype == scratch.dtype:
        torch.mul(x, x, out=scratch)
    else:
        scratch.copy_(x).square_()


_FILL: Mapping[Moment, Callable[[Tensor, Tensor], None]] = {
    Moment.ABS: _fill_abs,
    Moment.VALUE: _fill_value,
    Moment.SQUARE: _fill_square,
}


def _column_sums(x: Tensor, token_mask: Tensor | None, kinds: Sequence[Moment]) -> list[Tensor]:
    """Return sums over the first dimension of ``x`` [T, ...], for each kind [...] float64."""
    dtype = accumulation_dtype(x.dtype)
    length, rest = x.shape[0], x.shape[1:]
    if x.numel() == 0:
        return [x.new_zeros(rest, dtype=torch.float64) for _ in kinds]
    if x.device.type != "cpu" and token_mask is None:
        return [_fused_sum(x, kind, dtype) for kind in kinds]
    width = rest.numel()
    step = min(length, rows_at_once(width * dtype.itemsize, x.device))
    with Workspace(x.device) as workspace:
        filled = scratch = workspace.empty((step, *rest), dtype)
        totals = [ColumnSum(width, dtype, x.device, workspace) for _ in kinds]
        adders = [total.adder(scratch.view(step, width)) for total in totals]
        for start in range(0, length, step):
            rows = x[start : start + step]
            if start + step > length:
                scratch[len(rows) :].zero_()
                filled = scratch[: len(rows)]
            for kind, add in zip(kinds, adders, strict=True):
                # After the first kind the rows are in the cache.
                _FILL[kind](filled, rows)
                if token_mask is not None:
                    filled.masked_fill_(~token_mask[start : start + step].unsqueeze(-1), 0)
                add()
        return [total.result().view(rest) for total in totals]


def _fused_sum(x: Tensor, kind: Moment, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first dimension in one kernel that reads ``x`` once and needs no scratch."""
    if kind is Moment.VALUE:
        return x.sum(0, dtype=dtype).double()
    order = 1 if kind is Moment.ABS else 2
    norms: Tensor = torch.linalg.vector_norm(x, order, dim=0, dtype=dtype)
    return norms.double() if kind is Moment.ABS else norms.double().square_()
