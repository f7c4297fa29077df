"""The families of models that can be loaded; README.md beside this room tells how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megascore.weights.architecture import Experts
from megascore.weights.huggingface.config_values import ConfigValues
from megascore.weights.huggingface.experts import read_mixtral_experts, read_qwen3_experts

__all__ = ["FAMILIES", "ExpertNames", "ExpertSizes", "Family"]


class ExpertSizes(NamedTuple):
    """Keys of config.json with the sizes of routed experts."""

    num_experts: str
    """Where config.json lacks all of its names."""
    ffn_size: str


class ExpertNames(NamedTuple):
    """Names, inside of a layer, of the tensors of its experts; ``{expert}`` is the number of the expert."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """Everything about one ``model_type`` that its config.json leaves out because transformers takes it for granted."""

    qkv_bias: bool = False
    """Whether q, k and v have biases whatever ``attention_bias`` says."""
    qk_norm: bool = False
    """Whether each head's queries and keys go through a norm."""
    can_slide: bool = False
    """Whether its attention can have a sliding window."""
    slides_everywhere: bool = False
    """Whether a window holds in all layers, whatever ``max_window_layers`` says."""
    ignores_kinds: bool = False
    """Whether transformers slides in every layer whatever ``use_sliding_window`` and ``layer_types`` say."""
    read_experts: Callable[[ConfigValues, int], tuple[Experts, dict[str, Any]]] | None = None
    """Reads the routed experts of a config with so many layers; None for a dense family."""
    expert_names: ExpertNames | None = None
    """Names of the experts' tensors; None for a dense family."""
    expert_sizes: ExpertSizes | None = None
    """Where config.json has the sizes of the experts; None for a dense family."""
    hidden_multiple_of_heads: bool = False
    """Whether transformers refuses a hidden size that is no multiple of the attention heads, whatever head_dim says."""
    can_have_dense_layers: bool = False
    """Whether config.json can say that some layers have no experts (``mlp_only_layers``, ``decoder_sparse_step``)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that its config.json may lack, where they differ from those of `read_config`."""


FAMILIES = {
    "llama": Family(hidden_multiple_of_heads=True),
    "mistral": Family(
        can_slide=True,
        slides_everywhere=True,
        ignores_kinds=True,
        defaults={"sliding_window": 4096, "use_sliding_window": True},
    ),
    "mixtral": Family(
        can_slide=True,
        slides_everywhere=True,
        ignores_kinds=True,
        read_experts=read_mixtral_experts,
        expert_names=ExpertNames(
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
            "block_sparse_moe.experts.{expert}.w2.weight",
        ),
        expert_sizes=ExpertSizes("num_local_experts", "intermediate_size"),
        defaults={"use_sliding_window": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen2": Family(qkv_bias=True, can_slide=True),
    "qwen3": Family(qk_norm=True, can_slide=True, defaults={"head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        can_slide=True,
        slides_everywhere=True,
        read_experts=read_qwen3_experts,
        expert_names=ExpertNames(
            "mlp.gate.weight",
            "mlp.experts.{expert}.gate_proj.weight",
            "mlp.experts.{expert}.up_proj.weight",
            "mlp.experts.{expert}.down_proj.weight",
        ),
        expert_sizes=ExpertSizes("num_experts", "moe_intermediate_size"),
        can_have_dense_layers=True,
    ),
}
"""Families by the ``model_type`` of their config.json."""
