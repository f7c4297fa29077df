"""The entries of a tensor that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megascore.plans.kept_tensors import Entries, KeptTensor
from megascore.weights.huggingface.folder import TensorReader

__all__ = ["picked"]


def picked(tensor: KeptTensor, read: TensorReader) -> Tensor:
    """Return a tensor of the smaller model, in the type of the parent's.

    Args:
        tensor: What is wanted.
        read: Reads tensors of the parent.
    """
    name = tensor.source.name
    if tensor.experts is None:
        return _pick(read(name), tensor.entries)
    # Each expert keeps channels of its own: one is read at a time.
    made: Tensor | None = None
    for position, (expert, entries) in enumerate(tensor.experts):
        part = _pick(_expert(read, name, expert), entries)
        if made is None:
            made = part.new_empty((len(tensor.experts), *part.shape))
        made[position] = part
    assert made is not None, "a layer with experts keeps one at least"
    return made


def _expert(read: TensorReader, name: str, expert: int) -> Tensor:
    whole: Callable[[str, tuple[slice, ...]], Tensor] = read
    return whole(name, (slice(expert, expert + 1),))[0]


def _pick(tensor: Tensor, entries: Sequence[Entries]) -> Tensor:
    for dim, kept in enumerate(entries):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.int64))
    return tensor
