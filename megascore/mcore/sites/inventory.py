"""The inventory of a Megatron model: modules with channels, heads or experts that nothing scores."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megascore.errors import ModelError
from megascore.mcore.sites.norms import norms_of_layer
from megascore.sites.inventory import joined, unaccounted
from megascore.sites.places import Place
from megascore.sites.targets import PlaceKind

__all__ = ["decoder_of", "unknown_in_layer", "unknown_outside"]

INPUTS = frozenset(
    {
        *(f"self_attention.{name}" for name in ("linear_qkv", "q_layernorm", "k_layernorm")),
        # A weight for each head, beside its scores.
        "self_attention.core_attention.softmax_offset",
        # Multi-latent attention: low-rank projections with norms over the rank.
        *(f"self_attention.linear_{name}_proj" for name in ("q", "q_down", "q_up", "kv_down", "kv_up")),
        "self_attention.kv_layernorm",
        *(f"mlp.{name}" for name in ("linear_fc1", "router", "shared_experts.linear_fc1")),
        "mlp.shared_experts.gate_weight",
    }
)
"""What in a layer is no site, because its channels are scored elsewhere: as the inputs of an output projection that
they make, as experts, or, where they are the hidden states, at the norms."""

LINEAR_REPLACEMENT = "a linear layer in place of attention or an MLP, which has no heads or channels of its own"
REASONS = {
    "ColumnParallelLinearGathered": LINEAR_REPLACEMENT,
    "TELayerNormColumnParallelLinearGathered": LINEAR_REPLACEMENT,
    "CrossAttention": "whose heads read another stack of layers",
    "MultiTokenPredictionBlock": "which stands behind the decoder and is not part of it",
}
"""Why modules of these classes have no score; others are not known at all."""

AROUND_LAYERS = ("embedding", "output_layer")
"""What in a language model makes or reads the hidden states, outside of its layers."""


def decoder_of(chunk: nn.Module) -> list[tuple[str, TransformerBlock]]:
    """Return the stack of layers to score with its path, as a list of one; an empty list for a chunk without one.

    Raises:
        ModelError: there are several, and none of them is the only one of the language model inside.
    """
    blocks = [(name, module) for name, module in chunk.named_modules() if isinstance(module, TransformerBlock)]
    if len(blocks) < 2:
        return blocks
    owners = [f"{name}." for name, module in chunk.named_modules() if name and isinstance(module, LanguageModule)]
    inside = [(name, block) for name, block in blocks if name.startswith(tuple(owners))]
    if len(inside) != 1:
        names = ", ".join(repr(name) for name, _ in blocks)
        raise ModelError(
            f"{type(chunk).__name__} has several stacks of layers ({names}), and does not say which one is its "
            f"language model. Name the part to score: attach(model, part={blocks[-1][0]!r}), and run the model as ever."
        )
    return inside


def unknown_in_layer(
    name: str, layer: nn.Module, places: Sequence[Place], prefix: str, hidden_size: int
) -> Sequence[str]:
    """Return the names of what is unknown in a layer, each with its class.

    Args:
        name: Global name of the layer.
        layer: The layer.
        places: The places in it, itself not among them.
        prefix: Of their local names.
        hidden_size: Of the model.
    """
    if not isinstance(layer, TransformerLayer):
        return [f"{name}: {_with_reason(type(layer).__name__)}"]
    norms, unnamed = norms_of_layer(layer, hidden_size)
    # A projection is not scored because the norm fused into it is, nor are experts' channels because experts are.
    fused = {norm.path for norm in norms if norm.is_fused}
    has_channels = any(place.kind is PlaceKind.ROUTED_EXPERT_PROJECTION for place in places)
    scored = {place.local_name[len(prefix) :] for place in places if has_channels or not _is_experts(place)}
    found = [(path, what) for path, what in unaccounted(layer, (scored - fused) | INPUTS)]
    outer = tuple(f"{path}." for path, _ in found)
    found += [
        (path, f"a norm, in {type(layer.get_submodule(path)).__name__}")
        for path in unnamed
        if not f"{path}.".startswith(outer)
    ]
    return [f"{joined(name, path)}: {_with_reason(what)}" for path, what in found]


def unknown_outside(chunk_name: str, chunk: nn.Module) -> Sequence[str]:
    """Return the names of what is unknown outside of a chunk's decoder layers, each with its class."""
    known = {
        joined(name, part)
        for name, module in chunk.named_modules()
        if isinstance(module, LanguageModule)
        for part in AROUND_LAYERS
    }
    for name, _ in decoder_of(chunk):
        known |= {joined(name, "layers"), joined(name, "final_layernorm")}
    return [f"{joined(chunk_name, path)}: {_with_reason(what)}" for path, what in unaccounted(chunk, known)]


def _with_reason(what: str) -> str:
    """Return what a module is, with the reason why it has no score where its class tells."""
    return f"{what}, {REASONS[what]}" if what in REASONS else what


def _is_experts(place: Place) -> bool:
    return place.kind is PlaceKind.ROUTED_EXPERTS
