"""Output projections of a plan's layers: their places in the model, and their tensors in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megascore.plans.kept_tensors import KeptTensor, kept_tensors
from megascore.plans.orders import EXPERT
from megascore.plans.parent import Parent
from megascore.plans.units import Units, all_units
from megascore.scores.assemble import layer_of
from megascore.sites.places import Place
from megascore.sites.targets import PlaceKind

__all__ = ["Projection", "projections_of", "tensor_names"]

Which = tuple[int, PlaceKind, "int | None"]
"""Layer, kind and expert."""

DIM_OF = {
    PlaceKind.ATTENTION_PROJECTION: "query",
    PlaceKind.FFN_PROJECTION: "ffn",
    PlaceKind.ROUTED_EXPERT_PROJECTION: "expert_ffn",
}
"""What the columns of an output projection are, by its kind; in the order in which a layer runs them."""


@dataclass(frozen=True)
class Projection:
    """An output projection of which inputs go."""

    place: Place
    kept: tuple[int, ...]
    """Channels that stay, in the order of the smaller model."""
    name: str
    """Of its tensor in the parent; with ``#`` and the number of an expert where all experts are in one."""

    @property
    def bias_name(self) -> str:
        """Name of the bias beside it, where there is one."""
        return f"{self.name.removesuffix('.weight')}.bias"

    @property
    def is_of_expert(self) -> bool:
        """Whether a router sends it tokens, and perhaps none."""
        return self.place.kind is PlaceKind.ROUTED_EXPERT_PROJECTION


def tensor_names(parent: Parent) -> dict[Which, str]:
    """Return the names of the tensors of all output projections."""
    whole = kept_tensors(parent.config, all_units(parent.config))
    return {which: name for tensor in whole for which, name in _names_in(tensor)}


def _names_in(tensor: KeptTensor) -> Iterator[tuple[Which, str]]:
    source = tensor.source
    for kind, dim in DIM_OF.items():
        if source.layer is None or len(source.dims) < 2 or source.dims[-2:] != ("hidden", dim):
            continue
        if tensor.experts is None:
            yield (source.layer, kind, source.expert), source.name
        for expert, _ in tensor.experts or ():
            yield (source.layer, kind, expert), f"{source.name}#{expert}"


def projections_of(places: Sequence[Place], units: Units, parent: Parent, names: dict[Which, str]) -> list[Projection]:
    """Return the projections of a layer that are to be fitted again, in the order in which it runs them.

    Args:
        places: Of a layer that stays.
        units: What stays of the model.
        parent: The model.
        names: As `tensor_names` gives them.
    """
    found = []
    for kind in DIM_OF:
        for place in places:
            if place.kind is kind and (entry := _projection(place, units, parent, names)) is not None:
                found.append(entry)
    return found


def _projection(place: Place, units: Units, parent: Parent, names: dict[Which, str]) -> Projection | None:
    layer, kind = layer_of(place.name), place.kind
    of_layer, total = units.of_layers[layer], place.placement.shard.total
    expert = None
    if kind is PlaceKind.FFN_PROJECTION:
        kept: tuple[int, ...] = of_layer.ffn
    elif kind is PlaceKind.ATTENTION_PROJECTION:
        width = total // parent.config.architecture.num_heads
        kept = tuple(head * width + channel for head in of_layer.attention_heads for channel in range(width))
    else:
        match = EXPERT.search(place.name)
        assert match is not None, place.name
        expert = int(match[1])
        if expert not in of_layer.experts:
            return None
        kept = of_layer.expert_ffn[of_layer.experts.index(expert)]
    return None if len(kept) == total else Projection(place, kept, names[layer, kind, expert])
