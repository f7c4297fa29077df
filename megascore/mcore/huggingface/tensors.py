"""Which Hugging Face tensors make up each Megatron parameter, in one table.

Sizes are named: ``query`` and ``key_value`` are heads times head_dim, the others speak for themselves. Every parameter
that tensor parallelism splits takes the same contiguous share of each of its sources, and weaves the shares together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megascore.mcore.huggingface.config import HuggingFaceModelConfig

__all__ = ["RULES", "Rule", "Source", "all_sources", "find_rule", "is_known_extra", "sizes_of", "sources_of", "weave"]

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: its name, ``{layer}`` being the global layer number, and its named sizes."""

    name: str
    shape: tuple[str, ...]


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


def _layer_rule(
    names: str | tuple[str, ...],
    sources: dict[str, tuple[str, ...]],
    split_dim: int | None,
    *,
    per_kv_head: bool = False,
    only_if: str | None = None,
) -> Rule:
    given = (names,) if isinstance(names, str) else names
    return Rule(
        tuple(LAYER + name for name in given),
        tuple(Source(HF_LAYER + name, shape) for name, shape in sources.items()),
        split_dim,
        per_kv_head,
        only_if,
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
    ),
    _layer_rule(
        "mlp.linear_fc1.bias", {"mlp.gate_proj.bias": ("ffn",), "mlp.up_proj.bias": ("ffn",)}, 0, only_if="mlp_bias"
    ),
    _layer_rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": ("hidden", "ffn")}, 1),
    _layer_rule("mlp.linear_fc2.bias", {"mlp.down_proj.bias": ("hidden",)}, None, only_if="mlp_bias"),
    Rule(("decoder.final_layernorm.weight",), (Source("model.norm.weight", ("hidden",)),), None),
    Rule(("output_layer.weight",), (HEAD,), 0),
)
_RULE_OF = {name: rule for rule in RULES for name in rule.parameters}


def find_rule(parameter: str) -> tuple[Rule, int | None] | None:
    """The rule for a Megatron parameter, and the local layer number in its name; None where there is no rule."""
    match = LAYER_PARAMETER.match(parameter)
    name = parameter if match is None else LAYER + parameter[match.end() :]
    rule = _RULE_OF.get(name)
    return None if rule is None else (rule, None if match is None else int(match.group(1)))


def sources_of(rule: Rule, config: HuggingFaceModelConfig, layer: int | None) -> tuple[Source, ...]:
    """The tensors of the checkpoint that make up a parameter.

    Args:
        rule: Of the parameter.
        config: The model; says which variant it is.
        layer: Global layer number, counted from 0; None outside of layers.

    Returns:
        Sources with their full names; none where the parameter is zero.
    """
    if rule.only_if is not None and not getattr(config, rule.only_if):
        return ()
    if rule.sources == (HEAD,) and config.tied_embeddings:
        return (EMBEDDING,)
    return tuple(Source(source.name.format(layer=layer), source.shape) for source in rule.sources)


def all_sources(config: HuggingFaceModelConfig) -> Iterator[Source]:
    """Every tensor that a checkpoint of this model must have; one that is used twice comes twice."""
    for rule in RULES:
        in_layers = rule.parameters[0].startswith(LAYER)
        for layer in range(config.num_layers) if in_layers else [None]:
            yield from sources_of(rule, config, layer)


def sizes_of(config: HuggingFaceModelConfig) -> dict[str, int]:
    """The named sizes of a model's tensors."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.ffn_size,
        "query": config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
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
