"""Megatron models with other layers than the usual ones, small, in float64 and the same in every layout."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

__all__ = ["VOCAB", "latent_attention", "mamba", "mixed_layers", "two_towers", "with_token_prediction"]

VOCAB, SEQUENCE = 64, 16
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "params_dtype": torch.float64,
    "use_cpu_initialization": True,
}


def latent_attention(tensor: int = 1, sequence: bool = False) -> Any:
    """Return a model with multi-latent attention; the values of its 4 heads are 6 wide, other heads' would be 8."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megascore.mcore.compat import submodules_of
    from megascore.mcore.models.spec import TorchNorm

    config = MLATransformerConfig(
        **SIZES,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        multi_latent_attention=True,
        qk_layernorm=True,
        rope_type="rope",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
    )
    layer = _layer_spec(multi_latent_attention=True, qk_layernorm=True)
    attention = submodules_of(layer.submodules.self_attention)
    attention.core_attention = CausalAttention
    attention.q_layernorm = attention.kv_layernorm = TorchNorm
    # Megatron looks for Transformer Engine's class without looking whether there is one.
    with patch.multiple(multi_latent_attention, TELinear=nn.Bilinear, TEColumnParallelLinear=nn.Bilinear):
        return _gpt(config, [layer, layer])


class CausalAttention(nn.Module):
    """Attention whose values have another width than its keys, which Megatron leaves to Transformer Engine."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def mixed_layers(tensor: int = 1) -> Any:
    """Return a model with 2 KV heads, then with 1 and fewer FFN channels, then parts that are absent or a linear."""
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    absent = {"no_op": True, "n_heads_in_group": None, "ffn_hidden_size": None}
    linear = {**absent, "no_op": False, "replace_with_linear": True}
    blocks = [
        {"attention": {"n_heads_in_group": 2}, "mlp": {"ffn_hidden_size": 48}},
        {"attention": {"n_heads_in_group": 4}, "mlp": {"ffn_hidden_size": 24}},
        {"attention": dict(absent), "mlp": dict(linear)},
        {"attention": dict(linear), "mlp": dict(absent)},
    ]
    config = HeterogeneousTransformerConfig(
        **{**SIZES, "num_layers": len(blocks)},
        num_query_groups=2,
        tensor_model_parallel_size=tensor,
        heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks}),
    )
    layers = get_gpt_heterogeneous_layer_spec(config, use_te=False).layer_specs
    return _gpt(config, [_with_torch_norms(layer) for layer in layers])


def with_token_prediction() -> Any:
    """Return a model with a block for multi-token prediction beside its decoder."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megascore.mcore.models.spec import TorchNorm

    config = TransformerConfig(**SIZES, mtp_num_layers=1)
    layers = [_layer_spec(), _layer_spec()]
    prediction = get_gpt_mtp_block_spec(config, _block(layers), use_transformer_engine=False)
    for spec in prediction.layer_specs:
        spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = TorchNorm
    return _gpt(config, layers, mtp_block_spec=prediction)


def mamba() -> Any:
    """Return Megatron's hybrid stack, with an attention and an MLP layer, as mamba's own layers need CUDA."""
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm import mamba_block
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megascore.mcore.models.spec import TorchNorm

    parts = _layer_spec().submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=TorchNorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=TorchNorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    stack = ModuleSpec(
        module=mamba_block.MambaStack,
        submodules=mamba_block.MambaStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    with patch.object(mamba_block, "TENorm", TorchNorm):
        return MambaModel(
            config=TransformerConfig(**SIZES),
            mamba_stack_spec=stack,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            hybrid_override_pattern="*-",
        ).eval()


def two_towers() -> Any:
    """Return a module with a language model and another stack of layers, named as in Megatron's LLaVA."""
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**SIZES)
    model: Any = MegatronModule(config)
    model.vision_model = nn.Module()
    model.vision_model.decoder = TransformerBlock(config, _block([_layer_spec(), _layer_spec()]))
    model.language_model = _gpt(config, [_layer_spec(), _layer_spec()])
    return model.eval()


def _gpt(config: Any, layers: list[Any], **options: Any) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = GPTModel(
        config=config,
        transformer_layer_spec=_block(layers),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        **options,
    )
    return model.eval()


def _block(layers: list[Any]) -> Any:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megascore.mcore.models.spec import TorchNorm

    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)


def _layer_spec(**options: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return _with_torch_norms(get_gpt_layer_local_spec(normalization="RMSNorm", **options))


def _with_torch_norms(layer: Any) -> Any:
    from megatron.core.transformer.identity_op import IdentityOp

    from megascore.mcore.models.spec import TorchNorm

    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if getattr(layer.submodules, name) is not IdentityOp:
            setattr(layer.submodules, name, TorchNorm)
    return layer
