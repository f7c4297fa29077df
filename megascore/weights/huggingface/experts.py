"""Routed experts as each family's config.json describes them."""

from __future__ import annotations

from typing import Any

from megascore.errors import ModelError
from megascore.weights.architecture import Experts
from megascore.weights.huggingface.config_values import ConfigValues, UnsupportedModelError

__all__ = ["read_mixtral_experts", "read_qwen3_experts"]


def read_mixtral_experts(values: ConfigValues, num_layers: int) -> tuple[Experts, dict[str, Any]]:
    """Read the experts of a Mixtral: in every layer, in place of the dense MLP.

    Returns:
        The experts, and the arguments of Megatron's ``TransformerConfig`` that say how tokens choose among them.

    Raises:
        ModelError: a number is missing or wrong.
    """
    num_experts, top_k = _numbers(values, num_experts_default=8, top_k_default=2)
    experts = Experts(num_experts, values.positive("intermediate_size"), (True,) * num_layers)
    return experts, _router(values, top_k, normalized=True)


def read_qwen3_experts(values: ConfigValues, num_layers: int) -> tuple[Experts, dict[str, Any]]:
    """Read the experts of a Qwen3-MoE: every so many layers, but for those that are named as dense.

    Returns:
        As `read_mixtral_experts`.

    Raises:
        ModelError: a number is missing or wrong, no layer has experts, or attention has biases, which Megatron-Core
            ties to biases of the experts.
    """
    values.refuse_unless("attention_bias", False, default=False)
    step, dense = values.positive("decoder_sparse_step", default=1), values.layer_numbers("mlp_only_layers")
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(layers):
        raise ModelError(
            f"{values.path}: decoder_sparse_step={step} and mlp_only_layers={dense} leave no layer with experts: "
            "expected one at least."
        )
    num_experts, top_k = _numbers(values, num_experts_default=128, top_k_default=8)
    experts = Experts(num_experts, values.positive("moe_intermediate_size"), layers)
    return experts, _router(values, top_k, normalized=values.flag("norm_topk_prob", default=False))


def _numbers(values: ConfigValues, *, num_experts_default: int, top_k_default: int) -> tuple[int, int]:
    # transformers 5 writes the first name for every model, older ones wrote the second for Qwen.
    key = "num_experts" if values.get("num_local_experts") is None else "num_local_experts"
    num_experts = values.positive(key, default=num_experts_default)
    top_k = values.positive("num_experts_per_tok", default=top_k_default)
    if top_k > num_experts:
        raise ModelError(f"{values.path}: num_experts_per_tok={top_k} is more than the model's {num_experts} experts.")
    return num_experts, top_k


def _router(values: ConfigValues, top_k: int, *, normalized: bool) -> dict[str, Any]:
    """Return Megatron's arguments; ``normalized`` says that the weights of a token's experts sum to one."""
    if top_k == 1 and normalized:
        raise UnsupportedModelError(
            f"{values.path}: num_experts_per_tok=1 with weights that sum to one is not supported: Megatron-Core takes "
            "a single expert by its softmax over all."
        )
    # A softmax over the chosen experts alone equals one over all that is then made to sum to one.
    return {"moe_router_topk": top_k, "moe_router_pre_softmax": not normalized}
