"""Where scores can be taken: the modules of a model, named and placed without regard to who runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megascore.errors import LayoutError
from megascore.hooks import ForwardHook
from megascore.parallel.axes import Placement
from megascore.scoring.recipes import ScoreRequest

__all__ = ["KIND_OF_TARGET", "ModelView", "Place", "PlaceKind", "Reader", "check_covers_world", "first_tensor"]

Reader = Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[Tensor, Tensor]]
"""Takes what a forward hook gets (args, kwargs, output); returns input and output, sequence first [S, B, C].

At a norm both are the norm's output, for that is what is scored there.
"""


class PlaceKind(Enum):
    """What a module is in a transformer."""

    FFN_PROJECTION = "FFN output projection"
    ATTENTION_PROJECTION = "attention output projection"
    KV_HEADS = "attention output projection, by KV head"
    SHARED_EXPERT_PROJECTION = "shared expert output projection"
    ROUTED_EXPERTS = "routed experts of a layer"
    ROUTED_EXPERT_PROJECTION = "routed expert output projection"
    NORM = "norm"
    LAYER = "layer"


KIND_OF_TARGET = {
    "ffn": PlaceKind.FFN_PROJECTION,
    "attention_heads": PlaceKind.ATTENTION_PROJECTION,
    "kv_heads": PlaceKind.KV_HEADS,
    "experts": PlaceKind.ROUTED_EXPERTS,
    "expert_ffn": PlaceKind.ROUTED_EXPERT_PROJECTION,
    "shared_expert_ffn": PlaceKind.SHARED_EXPERT_PROJECTION,
    "hidden_size": PlaceKind.NORM,
    "layers": PlaceKind.LAYER,
}
"""The kind of module at which each target is measured."""


@dataclass(frozen=True)
class Place:
    """One module of the model, as this rank sees it."""

    kind: PlaceKind
    name: str
    """Global name, the same in every layout: ``decoder.layers.{global layer}.{module}``."""
    module: nn.Module
    local_name: str
    """Name in this rank's own module tree."""
    placement: Placement
    read: Reader

    @property
    def device(self) -> torch.device:
        """Device of the module's weights; the CPU for a module without any."""
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))


class ModelView(Protocol):
    """What scoring needs to know of a model, whichever library it comes from."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The model, or its virtual-pipeline chunks on this rank."""

    @property
    def places(self) -> Sequence[Place]:
        """The places that live on this rank."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Sizes of the whole model, for the score file.

        Has num_layers, hidden_size, num_attention_heads, num_kv_heads, head_dim and ffn_hidden_size.
        """

    @property
    def unknown(self) -> Sequence[str]:
        """Global names of modules on this rank that have channels, heads or experts, but of a kind that isn't known."""

    @property
    def layout(self) -> Mapping[str, Any]:
        """Degrees of the parallel axes, named as in the config, and "data"."""

    def make_hook(self, request: ScoreRequest, place: Place) -> ForwardHook:
        """Return a fresh hook for one score at ``place``."""


def check_covers_world(place: Place, world_size: int) -> None:
    """Refuse a place whose roles leave out a parallel axis: its data would be counted twice or not at all.

    Raises:
        LayoutError: the sizes of the axes with a role do not multiply to the world size.
    """
    covered = 1
    for axis, _ in place.placement.roles:
        covered *= axis.size
    if covered != world_size:
        given = " x ".join(f"{axis.name}={axis.size}" for axis, _ in place.placement.roles) or "none"
        raise LayoutError(
            f"{place.name} ({place.kind.value}): the parallel axes with a role here ({given}) account for {covered} of "
            f"{world_size} processes. Each axis of the layout needs a role at each place."
        )


def first_tensor(value: Any) -> Tensor:
    """Return a module's output, or the first element where it returns a tuple, as many layers do."""
    first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return first
