"""Places where scores can be taken: the modules of a model, named and placed without regard to who runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megascore.errors import DataError, LayoutError
from megascore.parallel.axes import Placement
from megascore.sites.targets import PlaceKind

__all__ = [
    "LocalMask",
    "MaskFollower",
    "ModelView",
    "Place",
    "Reader",
    "batch_first_mask",
    "check_covers_world",
    "first_tensor",
    "mask_mismatch",
]

Reader = Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[Tensor, Tensor]]
"""Takes what a forward hook gets (args, kwargs, output); returns input and output, sequence first [S, B, C].

At a norm both are the norm's output, for that is what is scored there.
"""


LocalMask = Callable[[Tensor, Tensor], Tensor]
"""Takes the mask of the batch, bool [B, S] of whole sequences, and the input that the reader returned; returns which of
this rank's tokens there count, bool, the input's shape without channels."""


class MaskFollower(Protocol):
    """What must happen between a batch's mask and some places, such as sending it where the tokens go."""

    def follow(self, current_mask: Callable[[], Tensor | None]) -> RemovableHandle:
        """Go along with the model's forward passes from now on, until the handle is removed."""


def batch_first_mask(mask: Tensor, activations: Tensor) -> Tensor:
    """Return the mask [S, B] of activations [S, B, C] on a rank that has whole sequences; [B * S] of [B * S, C].

    Raises:
        DataError: the mask is of another batch.
    """
    num_samples, length = mask.shape
    if activations.dim() == 2 and len(activations) == mask.numel():
        return mask.reshape(-1)
    if activations.dim() != 3 or activations.shape[:2] != (length, num_samples):
        raise mask_mismatch(mask, activations)
    return mask.T


def mask_mismatch(mask: Tensor, activations: Tensor, parts: int = 1) -> DataError:
    """Return the error for a mask that is not of the batch that runs; a rank has one of ``parts`` of the sequences."""
    what = f"{activations.shape[1]} samples of {activations.shape[0]}" if activations.dim() == 3 else len(activations)
    of_whole = f", 1/{parts} of each sequence" if parts > 1 else ""
    return DataError(
        f"the token mask is {list(mask.shape)} [samples, sequence], but the model runs {what} tokens here{of_whole}: "
        "give the mask of the batch that runs, for whole sequences."
    )


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
    num_heads: int | None = field(default=None, kw_only=True)
    """Query heads that share the channels equally, at an attention output projection."""
    local_mask: LocalMask = field(default=batch_first_mask, kw_only=True)
    mask_follower: MaskFollower | None = field(default=None, kw_only=True)
    """What `local_mask` depends on; places may share one."""

    num_features: int | None = field(default=None, kw_only=True)
    """Size of an output, at a layer's routed experts."""
    num_competing_groups: int | None = field(default=None, kw_only=True)
    """In how many groups of equal size its units compete, such as heads inside their KV groups; None where all do."""
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict, kw_only=True)
    """Process groups of more than one rank that together hold all who share this place, by the axis's name."""
    scored_module: Callable[[], nn.Module] | None = field(default=None, kw_only=True)
    """Returns what a hook takes for the module, where its weight is not that of the scored channels: a norm that is
    fused into a linear layer, KV heads of other ranks. May be collective over `groups`. None: the module itself."""
    obstacle: str | None = field(default=None, kw_only=True)
    """Why no hook can measure anything here, and what to do; None where one can. ``{target}`` stands for the target."""

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
        """Modules on this rank that have channels, heads or experts, but of a kind that isn't known.

        Each with its global name, or the local one outside of layers, and its class. All others are at a place, or
        their channels are scored at another one, as the outputs of a projection are where they are read.
        """

    @property
    def layout(self) -> Mapping[str, Any]:
        """Degrees of the parallel axes, named as in the config, and "data"."""


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
