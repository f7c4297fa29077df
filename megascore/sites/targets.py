"""Targets that can be ranked: one table, from which everything else that depends on a target is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megascore.errors import ConfigError
from megascore.hooks.registry import methods

__all__ = ["TARGETS", "PlaceKind", "Target", "WholeModel", "check_methods"]


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


class WholeModel(Enum):
    """How the scores of all sites of a target become one vector of the model."""

    SUM = "sum"
    """Added up over the sites, as one feature runs through all of them; the sites' own vectors stay in the file."""
    STACK = "stack"
    """One entry for each layer; the file has no vectors of single sites."""


@dataclass(frozen=True)
class Target:
    """Something that can be ranked, and pruned by rank."""

    name: str
    """In configs and score files."""
    title: str
    """What is ranked, in the plural."""
    kind: PlaceKind
    """The modules at which it is measured."""
    where: str
    """Those modules in Megatron-Core's names, and what is looked at there."""
    default_method: str
    heads: bool = False
    """Units are heads: norm2 over the channels of each head is its score."""
    groups: str | None = None
    """The fact of the model that tells in how many groups units compete; None where all of a vector do."""
    whole_model: WholeModel | None = None
    """Whether one vector of the model is made of all sites, and how."""
    routed: bool = False
    """Sites see the tokens that a router sends them, each once for every expert it goes to."""


_ALL = (
    Target("ffn", "FFN channels", PlaceKind.FFN_PROJECTION, "input of `mlp.linear_fc2`", "l2_norm"),
    Target(
        "attention_heads",
        "attention heads",
        PlaceKind.ATTENTION_PROJECTION,
        "input of `self_attention.linear_proj`",
        "independent_contribution",
        heads=True,
        groups="num_kv_heads",
    ),
    Target(
        "kv_heads",
        "KV heads",
        PlaceKind.KV_HEADS,
        "input of `self_attention.linear_proj`, by KV head",
        "independent_contribution",
    ),
    Target(
        "hidden_size",
        "hidden features",
        PlaceKind.NORM,
        "output of every norm, also fused ones",
        "l2_norm",
        whole_model=WholeModel.SUM,
    ),
    Target(
        "layers",
        "layers",
        PlaceKind.LAYER,
        "input and output of each layer",
        "block_similarity",
        whole_model=WholeModel.STACK,
    ),
    Target(
        "experts",
        "routed experts",
        PlaceKind.ROUTED_EXPERTS,
        "output of each routed expert",
        "router_weighted_norm",
        routed=True,
    ),
    Target(
        "expert_ffn",
        "FFN channels of each routed expert",
        PlaceKind.ROUTED_EXPERT_PROJECTION,
        "input of each routed expert's `linear_fc2`",
        "l2_norm",
        routed=True,
    ),
    Target(
        "shared_expert_ffn",
        "FFN channels of shared experts",
        PlaceKind.SHARED_EXPERT_PROJECTION,
        "input of `shared_experts.linear_fc2`",
        "l2_norm",
    ),
)

TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}
"""Every target by its name."""


def check_methods() -> None:
    """Refuse hook classes that rank what is no target; they may come from anywhere.

    Raises:
        ConfigError: naming the class and the targets that there are, or two classes that claim one pair.
    """
    for (target, name), method in methods().items():
        if target not in TARGETS:
            raise ConfigError(
                f"{method.hook.__qualname__} says that its method '{name}' ranks '{target}', which is no target. "
                f"Known: {', '.join(TARGETS)}."
            )
