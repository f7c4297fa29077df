"""What a config.json says of routed experts."""

from __future__ import annotations

from dataclasses import dataclass

from megascore.errors import ModelError
from megascore.weights.huggingface.config_values import ConfigValues, UnsupportedModelError

__all__ = ["HuggingFaceExperts", "read_mixtral_experts", "read_qwen3_experts"]


@dataclass(frozen=True)
class HuggingFaceExperts:
    """Routed experts of a model."""

    num_experts: int
    top_k: int
    """Experts that a token goes to."""
    ffn_size: int
    """Channels inside each expert."""
    normalized: bool
    """Whether the weights of a token's experts sum to one, rather than those of all experts."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""
    gate_up_down: tuple[str, str, str]
    """The three projections as checkpoints name them, expert by expert; ``{expert}`` is the expert."""
    router: str
    """The router's weight as checkpoints with such names call it."""


def read_mixtral_experts(values: ConfigValues, num_layers: int) -> HuggingFaceExperts:
    """Read the experts of a Mixtral: in every layer, in place of the dense MLP.

    Raises:
        ModelError: a number is missing or wrong.
    """
    num_experts, top_k = _numbers(values, num_experts_default=8, top_k_default=2)
    expert = "block_sparse_moe.experts.{expert}."
    experts = HuggingFaceExperts(
        num_experts,
        top_k,
        ffn_size=values.positive("intermediate_size"),
        normalized=True,
        layers=(True,) * num_layers,
        gate_up_down=(f"{expert}w1.weight", f"{expert}w3.weight", f"{expert}w2.weight"),
        router="block_sparse_moe.gate.weight",
    )
    return _check_one_expert(values, experts)


def read_qwen3_experts(values: ConfigValues, num_layers: int) -> HuggingFaceExperts:
    """Read the experts of a Qwen3-MoE: every so many layers, but for those that are named as dense.

    Raises:
        ModelError: a number is missing or wrong, no layer has experts, or attention has biases, which Megatron-Core
            ties to biases of the experts.
    """
    values.refuse_unless("attention_bias", False, default=False)
    step, dense = values.positive("decoder_sparse_step", default=1), values.get("mlp_only_layers", [])
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(layers):
        raise ModelError(
            f"{values.path}: decoder_sparse_step={step} and mlp_only_layers={dense} leave no layer with experts: "
            "expected one at least."
        )
    num_experts, top_k = _numbers(values, num_experts_default=128, top_k_default=8)
    expert = "mlp.experts.{expert}."
    experts = HuggingFaceExperts(
        num_experts,
        top_k,
        ffn_size=values.positive("moe_intermediate_size"),
        normalized=bool(values.get("norm_topk_prob", False)),
        layers=layers,
        gate_up_down=(f"{expert}gate_proj.weight", f"{expert}up_proj.weight", f"{expert}down_proj.weight"),
        router="mlp.gate.weight",
    )
    return _check_one_expert(values, experts)


def _numbers(values: ConfigValues, *, num_experts_default: int, top_k_default: int) -> tuple[int, int]:
    # transformers 5 writes the first name for every model, older ones wrote the second for Qwen.
    named = values.get("num_local_experts", values.get("num_experts", num_experts_default))
    num_experts = ConfigValues(values.path, {"num_local_experts": named}).positive("num_local_experts")
    top_k = values.positive("num_experts_per_tok", default=top_k_default)
    if top_k > num_experts:
        raise ModelError(f"{values.path}: num_experts_per_tok={top_k} is more than the model's {num_experts} experts.")
    return num_experts, top_k


def _check_one_expert(values: ConfigValues, experts: HuggingFaceExperts) -> HuggingFaceExperts:
    if experts.top_k == 1 and experts.normalized:
        raise UnsupportedModelError(
            f"{values.path}: num_experts_per_tok=1 with weights that sum to one is not supported: Megatron-Core takes "
            "a single expert by its softmax over all."
        )
    return experts
