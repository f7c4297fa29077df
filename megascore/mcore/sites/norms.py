"""The norms of a Megatron layer over the hidden states: of their own, fused into a projection, or behind one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megascore.mcore.sites.fused_norm import has_fused_norm
from megascore.sites.inventory import is_norm, joined, norm_width

__all__ = ["LayerNorm", "norms_of_layer"]

NORMS_AROUND = {
    "self_attention": ("input_layernorm", "post_self_attn_layernorm"),
    "cross_attention": ("pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
    "mlp": ("pre_mlp_layernorm", "post_mlp_layernorm"),
}
"""The parts of a layer with the names of the norms before and behind each; not every layer or version has them all."""

OTHER_INPUTS = frozenset({"linear_proj", "linear_fc2", "out_proj", "linear_q_up_proj", "linear_kv_up_proj"})
"""Projections inside of the parts whose inputs are not the layer's hidden states, however wide."""
OTHER_NORMS = frozenset({"q_layernorm", "k_layernorm", "kv_layernorm"})
"""Norms inside of the parts of something else than the hidden states, however wide."""
BEHIND_PROJECTION = "post_layernorm"
"""What Megatron-Bridge calls the norm that it puts into an output projection, behind it."""


@dataclass(frozen=True)
class LayerNorm:
    """A norm over the hidden states."""

    name: str
    """Which of Megatron's norms it is, by where it stands."""
    path: str
    """Of the module, from the layer."""
    module: nn.Module
    is_fused: bool
    """True where the module is a projection that normalizes its input first."""


def norms_of_layer(layer: nn.Module, hidden_size: int) -> tuple[Sequence[LayerNorm], Sequence[str]]:
    """Return the norms over the hidden states in the order in which they run, and the paths of those that have no name.

    A position that several norms claim, such as projections of one input with a norm each, is given to none of them.
    """
    claims: dict[str, list[LayerNorm]] = defaultdict(list)
    for before, behind in NORMS_AROUND.values():
        for name in (before, behind):
            module: Any = getattr(layer, name, None)
            if module is not None and is_norm(name, module) and norm_width(module) in (hidden_size, None):
                claims[name].append(LayerNorm(name, name, module, False))
    unnamed = []
    for part_name, (before, behind) in NORMS_AROUND.items():
        part: Any = getattr(layer, part_name, None)
        for inside, module in part.named_modules() if part is not None else ():
            path, own_name = joined(part_name, inside), inside.rpartition(".")[2]
            is_fused = has_fused_norm(module) and module.layer_norm_weight.numel() == hidden_size
            if is_fused and own_name not in OTHER_INPUTS:
                claims[before].append(LayerNorm(before, path, module, True))
            elif is_norm(own_name, module) and own_name not in OTHER_NORMS and norm_width(module) == hidden_size:
                if own_name == BEHIND_PROJECTION:
                    claims[behind].append(LayerNorm(behind, path, module, False))
                else:
                    unnamed.append(path)
    order = [name for names in NORMS_AROUND.values() for name in names]
    named = [claims[name][0] for name in order if len(claims[name]) == 1]
    return named, [*unnamed, *(norm.path for name in order if len(claims[name]) > 1 for norm in claims[name])]
