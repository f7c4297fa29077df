"""Tiny models of the text families that transformers ships, each built from its config alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["PARTLY", "REFUSED", "WHOLLY", "ZOO", "build"]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim": 48,
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "num_layers": 2,
    "ffn_hidden_size": 48,
    "n_positions": 64,
    "n_inner": 48,
    "word_embed_proj_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
"""What configs call their sizes; each takes those that it has."""

OWN: dict[str, dict[str, Any]] = {
    # Each query head has keys and values of its own; rotary positions are on a part of them.
    name: {"num_key_value_heads": 4, "head_dim": 4, "num_experts_per_tok": 2}
    for name in ("deepseek_v2", "deepseek_v3")
}
WHOLLY = (
    "llama mistral ministral3 qwen2 qwen3 phi phi3 cohere cohere2 olmo olmo2 olmo3 exaone4 gemma gemma2 "
    "gemma3_text glm glm4 apertus vaultgemma bitnet starcoder2 stablelm persimmon granite helium smollm3 "
    "seed_oss arcee ernie4_5 mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v2 deepseek_v3 ernie4_5_moe "
    "glm4_moe granitemoe granitemoeshared phimoe minimax_m2 flex_olmo afmoe roberta "
).split()
"""Families, by ``model_type``, of which all is scored."""
PARTLY = {
    "bert": "the head's own transform",
    "diffllama": "the norm of its heads and their lambdas",
    "doge": "the residual scales, dynamic mask weights",
    "electra": "the projection of its embeddings, heads",
    "falcon_h1": "Mamba mixers, FFN, layer norms",
    "lfm2": "convolutions, attention, FFN, norms",
    "minimax": "linear attention",
    "opt": "attention, FFN, norms",
    "qwen3_next": "gated delta nets",
}
"""Families that are scored without some of their modules, which are named."""
REFUSED = "bloom codegen falcon gpt2 gpt_neox gptj jamba jetmoe mamba mpt recurrent_gemma".split()
"""Families whose layers are not found."""
ZOO = (*WHOLLY, *PARTLY)
"""Families that `attach` takes."""


def build(model_type: str, device: str = "cpu") -> nn.Module:
    """Build a model with a head for text, in float64, all of its norms with other weights than one."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config_class: Any = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    sizes = {name: size for name, size in SIZES.items() if known.get(name) is not None or name == "vocab_size"}
    if isinstance(known.get("layer_types"), list):
        # One of each kind.
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = [*kinds, *kinds][:2]
    # What is faster has no float64. Before transformers 5 there was one implementation.
    eager = {"experts_implementation": "eager"} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    sizes |= OWN.get(model_type, {})
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config_class(**sizes), **eager)
    model = model.double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() and weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model
