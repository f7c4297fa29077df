"""Which Hugging Face tensors make up each Megatron parameter, in one table.

Sizes are named: ``query`` and ``key_value`` are heads times head_dim, the others speak for themselves. Every parameter
that tensor parallelism splits takes the same contiguous share of each of its sources, and weaves the shares together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.expert_config import HuggingFaceExperts

__all__ = [
    "RULES",
    "Found",
    "Rule",
    "Source",
    "all_sources",
    "find_rule",
    "has_fused_experts",
    "is_known_extra",
    "sizes_of",
    "sources_of",
    "weave",
]

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.")
# Megatron's two ways to have experts: a list of MLPs, and Transformer Engine's grouped layers.
EXPERT_PARAMETER = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<number>\d+)\.(?P<linear>linear_fc[12])\.weight"
    r"|(?P<grouped_linear>linear_fc[12])\.weight(?P<grouped_number>\d+))$"
)
FUSED_GATE_UP, FUSED_DOWN = HF_LAYER + "mlp.experts.gate_up_proj", HF_LAYER + "mlp.experts.down_proj"


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: its name, ``{layer}`` being the global layer number, and its named sizes."""

    name: str
    shape: tuple[str, ...]
    parts: tuple[tuple[int, int], ...] = ()
    """Where only a part of the tensor is meant: of each leading dimension, which of how many equal parts."""


@dataclass(frozen=True)
class Rule:
    """How one kind of Megatron parameter is made."""

    parameters: tuple[str, ...]
    """Its name in Megatron, and under Transformer Engine where that differs; ``{layer}`` is the layer."""
    sources: tuple[Source, ...]
    """Tensors whose shares are woven together, in this order."""
    split_dim: int | None
    """Dimension that tensor parallelism splits; None where every rank has all of it."""
    per_kv_head: bool = False
    """Whether the rows of the sources take turns for each KV head, rather than following one another."""
    only_if: str | None = None
    """Field of the config that says whether the checkpoint has the sources. Where not, the parameter is zero."""
    of_experts: bool | None = None
    """Whether only layers with experts, or only those without, have it; None for all."""
    per_expert: bool = False
    """Whether each expert has one, split by expert tensor parallelism."""


class Found(NamedTuple):
    """What a parameter's name tells."""

    rule: Rule
    layer: int | None
    """Number of its layer on this rank; None outside of layers."""
    expert: int | None = None
    """Number of its expert on this rank; None outside of experts."""


def _layer_rule(
    names: str | tuple[str, ...],
    sources: dict[str, tuple[str, ...]],
    split_dim: int | None,
    *,
    per_kv_head: bool = False,
    only_if: str | None = None,
    of_experts: bool | None = None,
    per_expert: bool = False,
) -> Rule:
    given = (names,) if isinstance(names, str) else names
    return Rule(
        tuple(LAYER + name for name in given),
        tuple(Source(HF_LAYER + name, shape) for name, shape in sources.items()),
        split_dim,
        per_kv_head,
        only_if,
        of_experts,
        per_expert,
    )


EMBEDDING = Source("model.embed_tokens.weight", ("vocab", "hidden"))
HEAD = Source("lm_head.weight", ("vocab", "hidden"))

RULES = (
    Rule(("embedding.word_embeddings.weight",), (EMBEDDING,), 0),
    _layer_rule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": ("hidden",)},
        None,
    ),
    _layer_rule(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key_value", "hidden"),
            "self_attn.v_proj.weight": ("key_value", "hidden"),
        },
        0,
        per_kv_head=True,
    ),
    _layer_rule(
        "self_attention.linear_qkv.bias",
        {
            "self_attn.q_proj.bias": ("query",),
            "self_attn.k_proj.bias": ("key_value",),
            "self_attn.v_proj.bias": ("key_value",),
        },
        0,
        per_kv_head=True,
        only_if="qkv_bias",
    ),
    _layer_rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": ("head",)}, None, only_if="qk_norm"),
    _layer_rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": ("head",)}, None, only_if="qk_norm"),
    _layer_rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "query")}, 1),
    _layer_rule(
        "self_attention.linear_proj.bias", {"self_attn.o_proj.bias": ("hidden",)}, None, only_if="attention_output_bias"
    ),
    _layer_rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": ("hidden",)},
        None,
    ),
    _layer_rule(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        0,
        of_experts=False,
    ),
    _layer_rule(
        "mlp.linear_fc1.bias",
        {"mlp.gate_proj.bias": ("ffn",), "mlp.up_proj.bias": ("ffn",)},
        0,
        only_if="mlp_bias",
        of_experts=False,
    ),
    _layer_rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": ("hidden", "ffn")}, 1, of_experts=False),
    _layer_rule("mlp.linear_fc2.bias", {"mlp.down_proj.bias": ("hidden",)}, None, only_if="mlp_bias", of_experts=False),
    _layer_rule("mlp.router.weight", {"{router}": ("experts", "hidden")}, None, of_experts=True),
    _layer_rule(
        "mlp.experts.linear_fc1",
        {"{gate}": ("expert_ffn", "hidden"), "{up}": ("expert_ffn", "hidden")},
        0,
        of_experts=True,
        per_expert=True,
    ),
    _layer_rule("mlp.experts.linear_fc2", {"{down}": ("hidden", "expert_ffn")}, 1, of_experts=True, per_expert=True),
    Rule(("decoder.final_layernorm.weight",), (Source("model.norm.weight", ("hidden",)),), None),
    Rule(("output_layer.weight",), (HEAD,), 0),
)
_RULE_OF = {name: rule for rule in RULES for name in rule.parameters}


def find_rule(parameter: str) -> Found | None:
    """The rule for a Megatron parameter, with the numbers in its name; None where there is no rule."""
    match = LAYER_PARAMETER.match(parameter)
    if match is None:
        rule = _RULE_OF.get(parameter)
        return None if rule is None else Found(rule, None)
    name, expert = parameter[match.end() :], None
    if (of_expert := EXPERT_PARAMETER.match(name)) is not None:
        name = f"mlp.experts.{of_expert['linear'] or of_expert['grouped_linear']}"
        expert = int(of_expert["number"] or of_expert["grouped_number"])
    rule = _RULE_OF.get(LAYER + name)
    return None if rule is None else Found(rule, int(match.group(1)), expert)


def sources_of(
    rule: Rule, config: HuggingFaceModelConfig, layer: int | None, expert: int | None = None, *, fused: bool = False
) -> tuple[Source, ...]:
    """The tensors of the checkpoint that make up a parameter.

    Args:
        rule: Of the parameter.
        config: The model; says which variant it is.
        layer: Global layer number, counted from 0; None outside of layers.
        expert: Global number of the expert; None outside of experts.
        fused: Whether the checkpoint has the experts of a layer in one tensor, see `has_fused_experts`.

    Returns:
        Sources with their full names; none where the parameter is zero.
    """
    if rule.only_if is not None and not getattr(config, rule.only_if):
        return ()
    if rule.sources == (HEAD,) and config.tied_embeddings:
        return (EMBEDDING,)
    sources: tuple[Source, ...] = rule.sources
    if rule.of_experts:
        assert config.experts is not None
        if rule.per_expert and fused:
            assert expert is not None
            sources = _FUSED[rule.parameters]
            which = (expert, config.experts.num_experts)
            sources = tuple(replace(source, parts=(which, *source.parts)) for source in sources)
        else:
            names = _expert_names(config.experts, fused=fused)
            sources = tuple(replace(source, name=source.name.format(layer="{layer}", **names)) for source in sources)
    return tuple(replace(source, name=source.name.format(layer=layer, expert=expert)) for source in sources)


def _expert_names(experts: HuggingFaceExperts, *, fused: bool) -> dict[str, str]:
    # transformers 5 calls the router so wherever it has the experts in one tensor.
    router = "mlp.gate.weight" if fused else experts.router
    return {"router": router, **dict(zip(("gate", "up", "down"), experts.gate_up_down, strict=True))}


_FUSED: dict[tuple[str, ...], tuple[Source, ...]] = {
    (LAYER + "mlp.experts.linear_fc1",): tuple(
        Source(FUSED_GATE_UP, ("experts", "expert_ffn_twice", "hidden"), ((half, 2),)) for half in (0, 1)
    ),
    (LAYER + "mlp.experts.linear_fc2",): (Source(FUSED_DOWN, ("experts", "hidden", "expert_ffn")),),
}


def has_fused_experts(config: HuggingFaceModelConfig, names: frozenset[str]) -> bool:
    """Whether a checkpoint with tensors of these names has the experts of a layer in one tensor."""
    if config.experts is None:
        return False
    return FUSED_GATE_UP.format(layer=config.experts.layers.index(True)) in names


def all_sources(config: HuggingFaceModelConfig, *, fused: bool = False) -> Iterator[Source]:
    """Every tensor that a checkpoint of this model must have; one that is used twice comes twice."""
    for rule in RULES:
        if not rule.parameters[0].startswith(LAYER):
            yield from sources_of(rule, config, None)
            continue
        for layer in range(config.num_layers):
            has_experts = config.experts is not None and config.experts.layers[layer]
            if rule.of_experts not in (None, has_experts):
                continue
            experts = range(config.experts.num_experts) if rule.per_expert and config.experts else [None]
            for expert in experts:
                yield from sources_of(rule, config, layer, expert, fused=fused)


def sizes_of(config: HuggingFaceModelConfig) -> dict[str, int]:
    """The named sizes of a model's tensors."""
    experts = config.experts
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.ffn_size,
        "query": config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "experts": 0 if experts is None else experts.num_experts,
        "expert_ffn": 0 if experts is None else experts.ffn_size,
        "expert_ffn_twice": 0 if experts is None else 2 * experts.ffn_size,
    }


def is_known_extra(name: str, config: HuggingFaceModelConfig) -> bool:
    """Whether a tensor that no rule uses is one that checkpoints have for no effect."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD.name and config.tied_embeddings)


def weave(shares: list[torch.Tensor], num_groups: int) -> torch.Tensor:
    """Put the rows of several tensors together, group after group.

    Args:
        shares: Tensors that agree in all but their first dimension, which ``num_groups`` divides.
        num_groups: Number of groups of rows in each.

    Returns:
        Rows of the first group of each tensor, then of the second group of each, and so on.
    """
    grouped = [share.reshape(num_groups, -1, *share.shape[1:]) for share in shares]
    return torch.cat(grouped, dim=1).flatten(0, 1)
