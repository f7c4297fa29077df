"""Tiny random models of transformers, a layer or two each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["MODELS", "TOKENS", "l2_norm", "make_model", "record"]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FOUR_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "cohere": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"head_dim": 8},
    "apertus": {},
    "vaultgemma": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "bitnet": {},
    "mixtral": FOUR_EXPERTS,
    "qwen3_moe": {**FOUR_EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [0], "head_dim": 8},
    "gpt_oss": {**FOUR_EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {
        **FOUR_EXPERTS,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
    "qwen3_next": {
        **FOUR_EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bert": {},
}
"""Config values by ``model_type``."""

TOKENS = torch.randint(3, SIZES["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(1))


def make_model(model_type: str, **changes: Any) -> nn.Module:
    """Build a model in float64, all of its norms with other weights than one."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type], **changes})
    # Before transformers 5 there was one implementation.
    eager = {"experts_implementation": "eager"} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    model: nn.Module = AutoModel.from_config(config, **eager).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def l2_norm(x_BSC: Tensor) -> Tensor:
    """Return the `L2NormHook` vector [C] of activations."""
    return (x_BSC.double().abs().mean(1) ** 2).sum(0).sqrt()


def record(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the first input and the first output of each module, by its name."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            returned = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(returned, Tensor):
                inputs[name], outputs[name] = given.detach().clone(), returned.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in model.named_modules()]
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return inputs, outputs
