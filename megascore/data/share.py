"""Sharing: the rank that read the samples sends them to all others, each of which keeps those that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from megascore.data.batches import micro_batches_of_step, num_steps
from megascore.data.samples import Samples
from megascore.parallel.comm import PIECE_BYTES, broadcast_object, broadcast_tensor

__all__ = ["MicroBatches", "OwnSamples", "Share", "share_samples"]

INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Share:
    """Which samples of each step a data-parallel rank runs."""

    global_batch_size: int
    """Samples of a step, over all ranks."""
    data_rank: int = 0
    data_size: int = 1
    micro_batch_size: int = 1
    """Samples of one forward pass."""

    def samples(self, step: int) -> slice:
        """Return the samples of a step, over all ranks; the last step may have fewer."""
        return slice(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def micro_batches(self, step: int, num_samples: int) -> list[slice]:
        """Return this rank's micro-batches of a step, as slices of the ``num_samples`` samples of the run."""
        sizes = self.global_batch_size, self.micro_batch_size
        return micro_batches_of_step(step, num_samples, *sizes, self.data_rank, self.data_size)

    def rows(self, num_samples: int) -> Tensor:
        """Return the numbers of this rank's samples, ascending int64."""
        size = self.global_batch_size
        ranges = [
            torch.arange(part.start, part.stop)
            for step in range(num_steps(num_samples, size))
            for part in micro_batches_of_step(step, num_samples, size, size, self.data_rank, self.data_size)
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])


@dataclass(frozen=True)
class OwnSamples:
    """The samples that this rank runs, in host memory, under the numbers that they have among all."""

    num_samples: int
    """Of all ranks."""
    largest_token: int
    """Among all samples."""
    fingerprint: str
    """Of all samples, as in `Samples`."""
    rows: Tensor
    """Numbers of the samples that are here, ascending int64."""
    tokens: Tensor
    """[samples here, sequence_length] token ids; int32, where that holds all of them."""
    masks: Tensor | None
    """[samples here, sequence_length] bool, False for padding; None: nothing is padded."""
    lengths: Tensor | None
    """[num_samples] int64, real tokens of each sample, also of those elsewhere; None: nothing is padded."""

    def tokens_of(self, part: slice) -> Tensor:
        """Return token ids of some of this rank's samples, given by their numbers: [n, sequence_length] int64."""
        return self.tokens[self._here(part)].long()

    def mask_of(self, part: slice) -> Tensor | None:
        """Return the masks of some of this rank's samples, given by their numbers; None where nothing is padded."""
        return None if self.masks is None else self.masks[self._here(part)]

    def masks_of(self, parts: Sequence[slice]) -> list[Tensor] | None:
        """Return the masks of several slices of this rank's samples; None where nothing is padded."""
        return None if self.masks is None else [self.masks[self._here(part)] for part in parts]

    def num_tokens(self, some: slice) -> int:
        """Return the real tokens of some of all samples, wherever they are."""
        if self.lengths is None:
            return len(range(*some.indices(self.num_samples))) * self.tokens.shape[1]
        return int(self.lengths[some].sum())

    def _here(self, part: slice) -> slice:
        bounds = torch.searchsorted(self.rows, torch.tensor([part.start, part.stop]))
        first, last = bounds.tolist()
        assert last - first == part.stop - part.start, f"samples {part.start} to {part.stop} are another rank's"
        return slice(first, last)


class MicroBatches(Sequence[tuple[Tensor, Tensor | None]]):
    """Tokens [n, sequence_length] int64 and mask of several slices of a rank's samples, each made when asked for."""

    def __init__(self, samples: OwnSamples, parts: Sequence[slice]) -> None:
        """Keep what is needed; the slices are of all samples, by their numbers."""
        self._samples = samples
        self._parts = parts

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tensor, Tensor | None]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor | None] | list[tuple[Tensor, Tensor | None]]:
        """Return a micro-batch, or a list of them."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        part = self._parts[index]
        return self._samples.tokens_of(part), self._samples.mask_of(part)

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._parts)


def share_samples(samples: Samples | None, share: Share) -> OwnSamples:
    """Return this rank's part of the samples that rank 0 has read, in host memory.

    Collective over the world; ranks other than 0 bring None. Samples go to all ranks, a piece at a time, of which each
    keeps its own: half of int64's bytes for each token, and one byte for each entry of a mask.

    Args:
        samples: All of them.
        share: What this rank runs.
    """
    header = broadcast_object(None if samples is None else _header(samples))
    assert header is not None
    rows = share.rows(header.num_samples)
    tokens = _own_rows(None if samples is None else samples.tokens, header, rows)
    masks = None
    if header.lengths is not None:
        masks = _own_rows(None if samples is None else samples.masks, header, rows, torch.uint8).view(torch.bool)
    return OwnSamples(header.num_samples, header.largest_token, header.fingerprint, rows, tokens, masks, header.lengths)


@dataclass(frozen=True)
class _Header:
    num_samples: int
    sequence_length: int
    largest_token: int
    fingerprint: str
    lengths: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32 if self.largest_token < INT32_LIMIT else torch.int64


def _header(samples: Samples) -> _Header:
    lengths = None if samples.masks is None else samples.masks.sum(1)
    num_samples, length = samples.tokens.shape
    return _Header(num_samples, length, int(samples.tokens.max()), samples.fingerprint, lengths)


def _own_rows(own: Tensor | None, header: _Header, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return rows of rank 0's tensor [num_samples, sequence_length]. Collective over the world."""
    dtype = dtype or header.dtype
    kept = torch.empty(len(rows), header.sequence_length, dtype=dtype)
    step = max(1, PIECE_BYTES // (header.sequence_length * dtype.itemsize))
    for start in range(0, header.num_samples, step):
        piece = broadcast_tensor(None if own is None else own[start : start + step].to(dtype))
        first, last = torch.searchsorted(rows, torch.tensor([start, start + step])).tolist()
        torch.index_select(piece, 0, rows[first:last] - start, out=kept[first:last])
    return kept
