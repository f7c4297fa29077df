"""Blocks that do not run: they return at once, in the form in which the real ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megascore.capture.calls import HIDDEN_STATES
from megascore.capture.nested import nested_replace
from megascore.errors import ModelError

__all__ = ["ReturnForm", "forwards_replaced", "hidden_states_of"]

StandIn = Callable[..., Any]
"""Called with the block's number, its real forward method, and what the block was called with."""


@contextmanager
def forwards_replaced(blocks: Sequence[nn.Module], stand_in: StandIn) -> Iterator[None]:
    """Have ``stand_in(number, forward, *args, **kwargs)`` called in place of each block's forward method."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.forward = partial(stand_in, number, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            elif "forward" in block.__dict__:
                del block.forward


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states that a block returns: alone, first of several, or by name.

    Raises:
        ModelError: there are none.
    """
    found = output
    if isinstance(output, Mapping) and HIDDEN_STATES in output:
        found = output[HIDDEN_STATES]
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif isinstance(output, Mapping) and output:
        found = next(iter(output.values()))
    if not isinstance(found, Tensor):
        raise ModelError(
            f"a block returned {type(output).__name__}: expected hidden states, or something that begins with them."
        )
    return found


class ReturnForm:
    """What a block returns, but for the numbers."""

    def __init__(self, output: Any) -> None:
        """Learn the form from an output, of which nothing is kept.

        Raises:
            ModelError: there are no hidden states in it.
        """
        hidden = hidden_states_of(output)
        self._form = nested_replace(output, Tensor, lambda tensor: _Hole(None if tensor is hidden else tensor))

    def filled(self, hidden: Tensor) -> Any:
        """Return an output with these hidden states; other floating-point tensors in it are NaN, others zero."""
        return nested_replace(self._form, _Hole, lambda hole: hole.filled(hidden))


class _Hole:
    """Stands for a tensor in a form."""

    def __init__(self, other: Tensor | None) -> None:
        self._make = None if other is None else partial(_empty_like, other.shape, other.dtype, other.device)

    def filled(self, hidden: Tensor) -> Tensor:
        return hidden if self._make is None else self._make()


def _empty_like(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    can_be_nan = dtype.is_floating_point or dtype.is_complex
    return torch.full(shape, float("nan") if can_be_nan else 0, dtype=dtype, device=device)
