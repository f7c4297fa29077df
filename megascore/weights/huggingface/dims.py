"""Meanings of the dimensions of a Hugging Face model's tensors, and their sizes.

====================  ==================================================================================================
Name                  Entries
====================  ==================================================================================================
``vocab``             One for each token.
``hidden``            One for each channel of the hidden states; the same channel in all tensors of the model.
``ffn``               One for each channel inside of the dense MLP of one layer.
``query``             The channels of the first attention head of one layer, then of the second, and so on. Heads that
                      share a KV head follow one another.
``key_value``         The channels of the first KV head of one layer, then of the second, and so on.
``head``              One for each channel of a head; all heads of the layer share it.
``experts``           One for each routed expert of one layer.
``expert_ffn``        One for each channel inside of one expert.
``expert_ffn_twice``  Those of one expert's gate, then those of its up projection.
====================  ==================================================================================================
"""

from __future__ import annotations

from typing import Literal

from megascore.weights.huggingface.config import HuggingFaceModelConfig

__all__ = ["Dim", "sizes_of"]

Dim = Literal["vocab", "hidden", "ffn", "query", "key_value", "head", "experts", "expert_ffn", "expert_ffn_twice"]


def sizes_of(config: HuggingFaceModelConfig) -> dict[Dim, int]:
    """Return the size of each dimension; those of experts are 0 in a dense model."""
    model, experts = config.architecture, config.architecture.experts
    expert_ffn = 0 if experts is None else experts.ffn_size
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_size,
        "query": model.num_heads * config.head_dim,
        "key_value": model.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "experts": 0 if experts is None else experts.num_experts,
        "expert_ffn": expert_ffn,
        "expert_ffn_twice": 2 * expert_ffn,
    }
