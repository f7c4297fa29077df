"""Masks for the units that a plan drops: the model computes what the smaller one would, and no weight is lost.

- Channels and heads: the inputs of output projections are zero there.
- Features: every norm over the residual width sees zeros there, takes its mean over the others, and returns zeros
  there; nothing else reads the residual stream.
- Layers return what they were given.
- Experts: the router chooses among the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import PlanError
from megascore.masks.experts import expert_channels_masked, experts_masked
from megascore.masks.hooks import Undo, mask_input, scale_output
from megascore.plans.units import LayerUnits, Units
from megascore.scores.assemble import layer_of
from megascore.sites.places import ModelView, Place
from megascore.sites.targets import PlaceKind

__all__ = ["masked_view"]

RMS = ("rmsnorm", "rms_norm")
"""What the class of a norm without a mean is called; T5 and others call theirs LayerNorm, and are refused."""


@contextmanager
def masked_view(view: ModelView, units: Units, num_heads: int, places: Sequence[Place] | None = None) -> Iterator[None]:
    """Let a model compute with some of its units alone inside of the ``with`` block. Not collective.

    Every rank masks its own part; all of them enter and leave the block at the same place of the program.

    Args:
        view: The model.
        units: What is kept; of this model.
        num_heads: Query heads of a layer of the whole model.
        places: Those of the view at which it is masked; None for all.

    Raises:
        PlanError: a norm, a router or experts of a kind that can't be masked.
    """
    kept = {layer: of_layer for layer, of_layer in units.kept_layers()}
    with ExitStack() as stack:
        for place in view.places if places is None else places:
            for undo in _masks(view, place, units, kept, num_heads):
                stack.callback(undo)
        yield


def _masks(view: ModelView, place: Place, units: Units, kept: dict[int, LayerUnits], num_heads: int) -> Iterator[Undo]:
    if place.kind is PlaceKind.NORM:
        yield from _mask_norm(place, units.hidden_size)
        return
    if place.kind is PlaceKind.KV_HEADS:
        return  # Without its query heads a KV head does nothing.
    layer = layer_of(place.name)
    if layer not in kept:
        if place.kind is PlaceKind.LAYER:
            yield _skip(place.module)
        return
    of_layer = kept[layer]
    if place.kind is PlaceKind.FFN_PROJECTION:
        yield from _mask_projection(place, of_layer.ffn, 1)
    elif place.kind is PlaceKind.ATTENTION_PROJECTION:
        yield from _mask_projection(place, of_layer.attention_heads, place.placement.shard.total // num_heads)
    elif place.kind is PlaceKind.ROUTED_EXPERTS:
        yield from experts_masked(view, place, of_layer.experts)
    elif place.kind is PlaceKind.ROUTED_EXPERT_PROJECTION:
        yield from expert_channels_masked(place, of_layer)
    else:
        assert place.kind in (PlaceKind.LAYER, PlaceKind.SHARED_EXPERT_PROJECTION), place.kind


def _mask_projection(place: Place, kept: tuple[int, ...], channels_of_unit: int) -> Iterator[Undo]:
    """Mask the input of an output projection, of which this rank has some channels, or was given all of them."""
    shard = place.placement.shard
    whole = torch.zeros(shard.total, dtype=torch.bool)
    whole.view(-1, channels_of_unit)[list(kept)] = True
    if not bool(whole.all()):
        yield mask_input(place.module, {shard.total: whole, shard.length: whole[shard.offset :][: shard.length]})


def _mask_norm(place: Place, kept: tuple[int, ...]) -> Iterator[Undo]:
    total = place.placement.shard.total
    if len(kept) == total:
        return
    module: Any = place.module
    mask = torch.zeros(total, dtype=torch.bool)
    mask[list(kept)] = True
    # The mean of the squares of x * scale over all features is that of x over those that are kept.
    scale = math.sqrt(total / len(kept))
    if isinstance(getattr(module, "layer_norm_weight", None), Tensor):
        _require_rms(place, str(getattr(module, "normalization", "")))
        yield mask_input(module, {total: mask}, scale)
        yield _change_fused_weight(module, mask, scale)
        return
    _require_rms(place, type(module).__name__)
    yield mask_input(module, {total: mask}, scale)
    yield scale_output(module, mask, 1.0 / scale)


def _require_rms(place: Place, kind: str) -> None:
    if not any(name in kind.lower() for name in RMS):
        raise PlanError(
            f"{place.local_name} is a {kind or type(place.module).__name__}: features can be masked in RMSNorm alone, "
            "as others subtract a mean over all features. Plan without hidden_size, or prune the model and run that."
        )


def _change_fused_weight(module: Any, mask: Tensor, scale: float) -> Undo:
    """Let a norm that is fused into a linear layer return zeros, and undo the scale; its output is never seen."""
    weight: Tensor = module.layer_norm_weight
    before = weight.detach().clone()
    offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
    with torch.no_grad():
        weight.copy_((before + offset) * mask.to(weight.device) / scale - offset)

    def undo() -> None:
        with torch.no_grad():
            weight.copy_(before)

    return undo


def _skip(layer: nn.Module) -> Undo:
    """Let a layer return the hidden states that it was given."""

    def instead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    remove: Callable[[], None] = layer.register_forward_hook(instead, with_kwargs=True).remove
    return remove
