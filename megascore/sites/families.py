"""Module names of plain models: what the parts of a layer are called, and what Megatron-Core calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megascore.sites.targets import PlaceKind

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """Models whose layers have the same names inside."""

    list_name: str
    """Attribute that holds the layers."""
    marker: str
    """Attribute by which such a layer is known."""
    modules: Mapping[str, tuple[PlaceKind, str]]
    """What can be scored in a layer, with its global name there."""
    projection: str
    """The attention output projection."""
    outer_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms outside of layers, by their place from the module that holds the layers (``..`` is the one around it)."""


FAMILIES = {
    "Llama": Family(
        "layers",
        "self_attn",
        {
            "mlp.down_proj": (PlaceKind.FFN_PROJECTION, "mlp.linear_fc2"),
            "self_attn.o_proj": (PlaceKind.ATTENTION_PROJECTION, "self_attention.linear_proj"),
            "input_layernorm": (PlaceKind.NORM, "input_layernorm"),
            "post_attention_layernorm": (PlaceKind.NORM, "pre_mlp_layernorm"),
        },
        "self_attn.o_proj",
        {"norm": "decoder.final_layernorm"},
    ),
    "BERT": Family(
        "layer",
        "attention",
        {
            "output.dense": (PlaceKind.FFN_PROJECTION, "mlp.linear_fc2"),
            "attention.output.dense": (PlaceKind.ATTENTION_PROJECTION, "self_attention.linear_proj"),
            "attention.output.LayerNorm": (PlaceKind.NORM, "post_self_attn_layernorm"),
            "output.LayerNorm": (PlaceKind.NORM, "post_mlp_layernorm"),
        },
        "attention.output.dense",
        {"..embeddings.LayerNorm": "embedding.layernorm"},
    ),
}
"""The families that are known. Layers have the global name ``decoder.layers.{number}`` in encoders, too."""
