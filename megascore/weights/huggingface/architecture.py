"""A Hugging Face model in Megatron-Core's terms."""

from __future__ import annotations

from typing import Any

import torch

from megascore.weights.architecture import Architecture, Experts
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.expert_config import HuggingFaceExperts

__all__ = ["architecture_of"]


def architecture_of(config: HuggingFaceModelConfig) -> Architecture:
    """Return what a Megatron model with the weights of a Hugging Face model is built from."""
    experts = config.experts
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        ffn_size=config.ffn_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        sliding_window=config.sliding_window,
        sliding_layers=config.sliding_layers,
        experts=None if experts is None else Experts(experts.num_experts, experts.ffn_size, experts.layers),
        transformer={
            "kv_channels": config.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.norm_eps,
            "qk_layernorm": config.qk_norm,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            # Megatron has one switch for the biases of the attention output and both MLP layers; those that the
            # checkpoint does not have are zero.
            "add_bias_linear": config.attention_output_bias or config.mlp_bias,
            "add_qkv_bias": config.qkv_bias,
            "attention_softmax_in_fp32": True,
            **({} if experts is None else _router(experts)),
        },
        gpt={
            "share_embeddings_and_output_weights": config.tied_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": config.rope_theta,
            "rope_scaling": config.rope_llama3_factor is not None,
            "rope_scaling_factor": config.rope_llama3_factor or 1.0,
            "seq_len_interpolation_factor": config.rope_linear_factor,
        },
    )


def _router(experts: HuggingFaceExperts) -> dict[str, Any]:
    return {
        "moe_router_topk": experts.top_k,
        # A softmax over the chosen experts alone equals one over all that is then made to sum to one.
        "moe_router_pre_softmax": not experts.normalized,
    }
