"""The table of a model's tensors: which Hugging Face tensors make up each Megatron parameter.

`megascore.weights.huggingface.dims` says what their dimensions mean. Every parameter that tensor parallelism splits
takes the same contiguous share of each of its sources, and weaves the shares together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megascore.weights.huggingface.dims import Dim

__all__ = ["EMBEDDING", "FUSED_DOWN", "HEAD", "LAYER", "RULES", "Rule", "Source"]

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint, or a part of one."""

    name: str
    """Name in the checkpoint. In `RULES` it still has ``{layer}``, ``{expert}`` and fields of `ExpertNames` to fill."""
    dims: tuple[Dim, ...]
    """Meaning of each dimension of the whole tensor."""
    parts: tuple[tuple[int, int], ...] = ()
    """Part that is meant: of each leading dimension, which of how many equal parts. Empty for the whole tensor."""
    layer: int | None = None
    """Number of its layer in the whole model; None outside of layers."""
    expert: int | None = None
    """Number of its expert in the whole layer; None where it is of no single expert."""


@dataclass(frozen=True)
class Rule:
    """One kind of Megatron parameter, and how it is made."""

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
    fused_sources: tuple[Source, ...] = ()
    """Its sources where all experts of a layer are in one tensor; their first part, which expert, is left to fill."""


def _layer_rule(
    names: str | tuple[str, ...],
    sources: Mapping[str, tuple[Dim, ...]],
    split_dim: int | None,
    *,
    per_kv_head: bool = False,
    only_if: str | None = None,
    of_experts: bool | None = None,
    per_expert: bool = False,
    fused_sources: tuple[Source, ...] = (),
) -> Rule:
    return Rule(
        tuple(LAYER + name for name in ((names,) if isinstance(names, str) else names)),
        tuple(Source(HF_LAYER + name, dims) for name, dims in sources.items()),
        split_dim,
        per_kv_head,
        only_if,
        of_experts,
        per_expert,
        fused_sources,
    )


EMBEDDING = Source("model.embed_tokens.weight", ("vocab", "hidden"))
HEAD = Source("lm_head.weight", ("vocab", "hidden"))
FUSED_GATE_UP = Source(HF_LAYER + "mlp.experts.gate_up_proj", ("experts", "expert_ffn_twice", "hidden"))
FUSED_DOWN = Source(HF_LAYER + "mlp.experts.down_proj", ("experts", "hidden", "expert_ffn"))

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
        fused_sources=tuple(replace(FUSED_GATE_UP, parts=((half, 2),)) for half in (0, 1)),
    ),
    _layer_rule(
        "mlp.experts.linear_fc2",
        {"{down}": ("hidden", "expert_ffn")},
        1,
        of_experts=True,
        per_expert=True,
        fused_sources=(FUSED_DOWN,),
    ),
    Rule(("decoder.final_layernorm.weight",), (Source("model.norm.weight", ("hidden",)),), None),
    Rule(("output_layer.weight",), (HEAD,), 0),
)
"""Rules for all parameters of all families."""
