"""Module names of plain models: what the parts of a layer are called, and what Megatron-Core calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megascore.sites.targets import PlaceKind

__all__ = ["FAMILIES", "HEADS", "Family"]


@dataclass(frozen=True)
class Family:
    """Models whose layers have the same names inside."""

    list_name: str
    """Attribute that holds the layers."""
    marker: str
    """Attribute by which such a layer is known."""
    attention: str
    """The module that knows how many heads there are."""
    projections: Mapping[str, tuple[PlaceKind, str]]
    """Output projections of a layer, with their global names there."""
    norms: Sequence[Mapping[str, str]]
    """Norms over the hidden size, with their global names. Each entry is all of them that a layer has: the same name
    stands before the MLP in one model and behind the attention in another, so one alone tells nothing."""
    inputs: frozenset[str]
    """What is no site, because its channels are scored elsewhere: as the inputs of an output projection that they make,
    or, where they are the hidden states, at the norms."""
    experts: Sequence[str]
    """Modules that hold all routed experts of a layer; a layer has one of them, or none."""
    outer_norms: Mapping[str, str]
    """Norms outside of layers, by their place from the module that holds the layers (``..`` is the one around it)."""
    outer_inputs: frozenset[str]
    """Modules outside of layers whose channels are the hidden states: embeddings, by their place as above."""


HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs", "pooler"})
"""What comes behind the layers and reads the hidden states, beside the layers or further out."""

FAMILIES = {
    "Llama": Family(
        "layers",
        "self_attn",
        attention="self_attn",
        projections={
            # Each layer has one of the first; c_proj: Starcoder2; fc2: Phi; dense_4h_to_h: Persimmon.
            **{
                f"mlp.{name}": (PlaceKind.FFN_PROJECTION, "mlp.linear_fc2")
                for name in ("down_proj", "c_proj", "fc2", "dense_4h_to_h")
            },
            **{
                f"self_attn.{name}": (PlaceKind.ATTENTION_PROJECTION, "self_attention.linear_proj")
                for name in ("o_proj", "dense")
            },
            **{
                f"mlp.{name}.down_proj": (PlaceKind.SHARED_EXPERT_PROJECTION, "mlp.shared_experts.linear_fc2")
                for name in ("shared_experts", "shared_expert")
            },
        },
        norms=(
            # Llama, Mistral, Qwen, Gemma 1, Phi-3.
            {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"},
            # Apertus.
            {"attention_layernorm": "input_layernorm", "feedforward_layernorm": "pre_mlp_layernorm"},
            # VaultGemma.
            {"input_layernorm": "input_layernorm", "pre_feedforward_layernorm": "pre_mlp_layernorm"},
            # Cohere: attention and MLP side by side, behind one norm.
            {"input_layernorm": "input_layernorm"},
            # Gemma 2 and 3.
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_self_attn_layernorm",
                "pre_feedforward_layernorm": "pre_mlp_layernorm",
                "post_feedforward_layernorm": "post_mlp_layernorm",
            },
            # OLMo 2 and 3, EXAONE 4.
            {
                "post_attention_layernorm": "post_self_attn_layernorm",
                "post_feedforward_layernorm": "post_mlp_layernorm",
            },
            # GLM-4.
            {
                "input_layernorm": "input_layernorm",
                "post_self_attn_layernorm": "post_self_attn_layernorm",
                "post_attention_layernorm": "pre_mlp_layernorm",
                "post_mlp_layernorm": "post_mlp_layernorm",
            },
            # AFMoE.
            {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_self_attn_layernorm",
                "pre_mlp_layernorm": "pre_mlp_layernorm",
                "post_mlp_layernorm": "post_mlp_layernorm",
            },
            # HyperCLOVA X.
            {
                "input_layernorm": "input_layernorm",
                "post_norm1": "post_self_attn_layernorm",
                "post_attention_layernorm": "pre_mlp_layernorm",
                "post_norm2": "post_mlp_layernorm",
            },
        ),
        inputs=frozenset(
            {
                *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")),
                # A factor for each input of the output projection, and a norm over those inputs.
                "self_attn.gate_proj",
                "self_attn.attn_sub_norm",
                "mlp.ffn_sub_norm",
                # A weight for each head, beside its scores.
                "self_attn.sinks",
                # Multi-latent attention: low-rank projections with norms over the rank.
                *(f"self_attn.{name}" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")),
                *(f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")),
                *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h")),
                *(f"self_attn.{name}" for name in ("query_key_value", "q_layernorm", "k_layernorm")),
                # Routers: their outputs are the experts, which are scored, or named where they are not.
                *(f"mlp.{name}" for name in ("gate", "router", "shared_expert_gate")),
                "mlp.expert_bias",
                "block_sparse_moe.router",
                *(
                    f"mlp.{shared}.{name}"
                    for shared in ("shared_experts", "shared_expert")
                    for name in ("gate_proj", "up_proj")
                ),
            }
        ),
        experts=("mlp.experts", "block_sparse_moe.experts"),
        outer_norms={"norm": "decoder.final_layernorm", "final_layernorm": "decoder.final_layernorm"},
        outer_inputs=frozenset({"embed_tokens"}),
    ),
    "BERT": Family(
        "layer",
        "attention",
        attention="attention.self",
        projections={
            "output.dense": (PlaceKind.FFN_PROJECTION, "mlp.linear_fc2"),
            "attention.output.dense": (PlaceKind.ATTENTION_PROJECTION, "self_attention.linear_proj"),
        },
        norms=(
            {
                "attention.output.LayerNorm": "post_self_attn_layernorm",
                "output.LayerNorm": "post_mlp_layernorm",
            },
        ),
        inputs=frozenset(
            {"attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"},
        ),
        experts=(),
        outer_norms={"..embeddings.LayerNorm": "embedding.layernorm"},
        outer_inputs=frozenset(f"..embeddings.{name}_embeddings" for name in ("word", "position", "token_type")),
    ),
}
"""The families that are known. Layers have the global name ``decoder.layers.{number}`` in encoders, too."""
