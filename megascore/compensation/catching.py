"""Inputs of output projections, caught while a layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megascore.sites.places import Place

__all__ = ["caught_inputs", "followed_mask", "local_mask", "swapped_weights"]


@contextmanager
def caught_inputs(places: Sequence[Place]) -> Iterator[Mapping[str, Tensor]]:
    """Give a mapping that is filled while the modules run: inputs [..., this rank's channels] by the place's name.

    A projection that no token reaches may not run, and then has no entry.
    """
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for place in places:

            def keep(
                _module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, place: Place = place
            ) -> None:
                caught[place.name] = place.read(args, kwargs, output)[0]

            stack.callback(place.module.register_forward_hook(keep, with_kwargs=True).remove)
        yield caught


@contextmanager
def followed_mask(places: Sequence[Place], mask: Tensor | None) -> Iterator[None]:
    """Let a batch's mask go where the tokens of routed experts go. The forward pass is then collective over these."""
    with ExitStack() as stack:
        followers = dict.fromkeys(place.mask_follower for place in places if place.mask_follower is not None)
        for follower in followers if mask is not None else ():
            stack.callback(follower.follow(lambda: mask).remove)
        yield


def local_mask(place: Place, mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return which of a place's inputs count, bool, their shape without channels; None for all."""
    return None if mask is None else place.local_mask(mask.to(inputs.device), inputs)


@contextmanager
def swapped_weights(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let tensors have other values inside. Not collective.

    Args:
        pairs: A tensor of the model, and the values, of its shape and type.
    """
    before = [weight.detach().clone() for weight, _ in pairs]
    with torch.no_grad():
        for weight, values in pairs:
            weight.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), values in zip(pairs, before, strict=True):
                weight.copy_(values)
