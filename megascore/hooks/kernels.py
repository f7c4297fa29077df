"""The few reductions that the hooks share: one pass over an activation, bounded scratch, no host synchronisation.

On a CPU, PyTorch's own reductions over the rows of a matrix are slow for what they do, so rows are copied a little at a
time into a scratch that stays in the cache, transformed there, and added up by a matrix-vector product with ones. No
compiler is needed. On a GPU one fused reduction reads the activation once and needs no scratch.

Shape letters: S sequence, B samples, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "abs_sum",
    "abs_sum_of_samples",
    "accumulation_dtype",
    "chunks",
    "column_norms",
    "num_tokens",
    "row_sum",
    "samples_at_once",
    "token_views",
]

CPU_SCRATCH_BYTES = 1 << 20
"""Scratch of a reduction on a CPU: it must stay in the L2 cache, of which cores have 1 to 2 MB."""
SCRATCH_BYTES = 1 << 25
"""Scratch elsewhere: large enough that kernels are launched rarely."""
SAMPLE_ROW_BYTES = 1 << 16
"""Accumulators of the samples reduced at once on a CPU: small beside the scratch, so that many rows fit there."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which activations of ``dtype`` are added up in a chunk: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(length: int, bytes_each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over ``length`` items of ``bytes_each`` scratch bytes, as many as the scratch holds."""
    budget = CPU_SCRATCH_BYTES if device.type == "cpu" else SCRATCH_BYTES
    step = max(1, budget // max(1, bytes_each))
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
    seq_len, _, num_channels = x.shape
    bytes_each = num_channels * 8
    if x.device.type != "cpu":
        return max(1, SCRATCH_BYTES // bytes_each)
    return max(1, SAMPLE_ROW_BYTES // bytes_each, CPU_SCRATCH_BYTES // (bytes_each * max(1, seq_len)))


def column_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each column of ``weight`` [E, C]: [C] float64."""
    return _column_sums(weight.detach(), None, _fill_square).sqrt()


def row_sum(x: Tensor) -> Tensor:
    """Return the sum over the rows of ``x`` [T, C], float32 or float64: [C], same dtype.

    A product with ones: the columns of a row-major matrix are added 3 times faster than by `Tensor.sum` on a CPU, and
    as fast on a GPU.
    """
    return torch.mv(x.mT, x.new_ones(x.shape[0]))


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
    total = x.new_zeros(rest.numel(), dtype=torch.float64)
    scratch: Tensor | None = None
    for start, stop in chunks(length, rest.numel() * dtype.itemsize, x.device):
        if scratch is None:
            scratch = x.new_empty((stop, *rest), dtype=dtype)
        part = scratch[: stop - start]
        fill(part, x[start:stop])
        if token_mask is not None:
            part.masked_fill_(~token_mask[start:stop].unsqueeze(-1), 0)
        total += row_sum(part.flatten(1) if part.dim() > 2 else part)
    return total.view(rest)
