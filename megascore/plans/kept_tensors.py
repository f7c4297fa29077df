"""What becomes of each tensor of a Hugging Face checkpoint when some units go: which entries stay, under which name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from megascore.plans.units import LayerUnits, Units
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.dims import Dim, sizes_of
from megascore.weights.huggingface.sources import places_of, sources_of
from megascore.weights.huggingface.tensors import RULES, Source

__all__ = ["Entries", "KeptSource", "KeptTensor", "kept_sources", "kept_tensors"]

Entries: TypeAlias = tuple[int, ...] | None
"""Which entries of one dimension stay, in order; None for all."""


@dataclass(frozen=True)
class KeptTensor:
    """One tensor of the smaller model."""

    source: Source
    """The whole tensor of the parent."""
    name: str
    """Its name in the smaller model."""
    shape: tuple[int, ...]
    """Its shape in the smaller model."""
    entries: tuple[Entries, ...]
    """Of each dimension of the parent's tensor; of one expert's part where `experts` is given."""
    experts: tuple[tuple[int, tuple[Entries, ...]], ...] | None = None
    """Where all experts of a layer are in one tensor: each expert that stays, and the entries of its own part."""


class KeptSource(NamedTuple):
    """A tensor of the parent of which something stays."""

    source: Source
    name: str
    """Its name in the smaller model."""
    kept: LayerUnits | None
    """What its layer keeps; None outside of layers."""
    shape: tuple[int, ...]
    """Its shape in the smaller model."""


def kept_sources(config: HuggingFaceModelConfig, units: Units) -> Iterator[KeptSource]:
    """Yield every tensor of the parent of which something stays, once, in the order of the table of tensors.

    Args:
        config: The parent, as `as_stored` returns it.
        units: What is kept; checked.
    """
    done = set()
    new_layers = {layer: position for position, layer in enumerate(units.layers)}
    new_experts = {
        layer: {expert: position for position, expert in enumerate(kept.experts)}
        for layer, kept in units.of_layers.items()
    }
    sizes = sizes_of(config)
    # Whatever the parent calls its tensors, the smaller model has the ordinary names.
    ordinary = replace(config, stored_names={})
    for rule in RULES:
        for layer, expert in places_of(rule, config):
            if layer is not None and layer not in new_layers:
                continue
            if expert is not None and expert not in new_experts[layer or 0]:
                continue
            kept = None if layer is None else units.of_layers[layer]
            renumbered = (
                None if layer is None else new_layers[layer],
                None if expert is None else new_experts[layer or 0][expert],
            )
            old, new = sources_of(rule, config, layer, expert), sources_of(rule, ordinary, *renumbered)
            for source, renamed in zip(old, new, strict=True):
                if source.name not in done:
                    done.add(source.name)
                    shape = tuple(_kept_size(dim, sizes, units, kept, source) for dim in source.dims)
                    yield KeptSource(source, renamed.name, kept, shape)


def kept_tensors(config: HuggingFaceModelConfig, units: Units) -> list[KeptTensor]:
    """Return all tensors of the model that has these units alone, in the order of the table of tensors.

    Args:
        config: The parent, as `as_stored` returns it.
        units: What is kept; checked.
    """
    return [_kept_tensor(found, config, units) for found in kept_sources(config, units)]


def _kept_tensor(found: KeptSource, config: HuggingFaceModelConfig, units: Units) -> KeptTensor:
    source, kept = found.source, found.kept
    if source.parts and kept is not None:
        experts = tuple(
            (expert, tuple(_entries(dim, config, units, kept, channels) for dim in source.dims[1:]))
            for expert, channels in zip(kept.experts, kept.expert_ffn, strict=True)
        )
        return KeptTensor(source, found.name, found.shape, (), experts)
    entries = tuple(_entries(dim, config, units, kept, _channels(source, kept)) for dim in source.dims)
    return KeptTensor(source, found.name, found.shape, entries)


def _channels(source: Source, kept: LayerUnits | None) -> tuple[int, ...]:
    """Return the channels that stay inside of the expert that a tensor is of; of the first where it is of all."""
    if kept is None or not kept.experts:
        return ()
    return kept.expert_ffn[0 if source.parts or source.expert is None else kept.experts.index(source.expert)]


def _kept_size(dim: Dim, sizes: Mapping[Dim, int], units: Units, kept: LayerUnits | None, source: Source) -> int:
    if dim in ("vocab", "head"):
        return sizes[dim]
    if dim == "hidden":
        return len(units.hidden_size)
    assert kept is not None, "all other dimensions are inside of layers"
    return {
        "ffn": len(kept.ffn),
        "query": len(kept.attention_heads) * sizes["head"],
        "key_value": len(kept.kv_heads) * sizes["head"],
        "experts": len(kept.experts),
        "expert_ffn": len(_channels(source, kept)),
        "expert_ffn_twice": 2 * len(_channels(source, kept)),
    }[dim]


def _entries(
    dim: Dim, config: HuggingFaceModelConfig, units: Units, kept: LayerUnits | None, channels: Sequence[int]
) -> Entries:
    """Return what stays of a dimension; ``channels`` are those of the expert that the tensor is of."""
    if dim in ("vocab", "head"):
        return None
    if dim == "hidden":
        return _or_all(units.hidden_size, config, dim)
    assert kept is not None, "all other dimensions are inside of layers"
    if dim == "ffn":
        return _or_all(kept.ffn, config, dim)
    if dim == "query":
        return _or_all(tuple(_channels_of(kept.attention_heads, config.head_dim)), config, dim)
    if dim == "key_value":
        return _or_all(tuple(_channels_of(kept.kv_heads, config.head_dim)), config, dim)
    if dim == "experts":
        return _or_all(kept.experts, config, dim)
    if dim == "expert_ffn":
        return _or_all(tuple(channels), config, dim)
    assert dim == "expert_ffn_twice"
    half = sizes_of(config)["expert_ffn"]
    return _or_all((*channels, *(half + channel for channel in channels)), config, dim)


def _or_all(entries: tuple[int, ...], config: HuggingFaceModelConfig, dim: Dim) -> Entries:
    """Return None where everything stays in its order: the tensor is then copied without picking it apart."""
    total = sizes_of(config)[dim]
    # The length is looked at first, as most tensors of a smaller model lose something.
    return None if len(entries) == total and entries == tuple(range(total)) else entries


def _channels_of(heads: Sequence[int], head_dim: int) -> Iterator[int]:
    for head in heads:
        yield from range(head * head_dim, (head + 1) * head_dim)
