"""What layers are built of: Transformer Engine's modules on CUDA where it is installed, else Megatron's own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megascore.mcore.compat import has_transformer_engine, submodules_of
from megascore.mcore.context_parallel import GatheringAttention

__all__ = ["TorchNorm", "block_spec"]


class TorchNorm:
    """PyTorch's RMSNorm or LayerNorm in the place of Megatron's, which needs apex for sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        """Build the norm that ``config.normalization`` names, in the model's data type."""
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm: torch.nn.Module = norms[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            # Megatron adds up the gradients of such parameters over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def block_spec(config: TransformerConfig, device: torch.device, chunk: int | None = None) -> Any:
    """What the layers of one pipeline chunk are built of.

    Args:
        config: The whole model.
        device: Where it will run.
        chunk: Number of the virtual-pipeline chunk, None without virtual pipelining.

    Returns:
        The ``transformer_layer_spec`` of a ``GPTModel``.
    """
    if device.type == "cuda" and has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    attention = submodules_of(layer.submodules.self_attention)
    for owner, name in (
        (layer.submodules, "input_layernorm"),
        (layer.submodules, "pre_mlp_layernorm"),
        (attention, "q_layernorm"),
        (attention, "k_layernorm"),
    ):
        if getattr(owner, name) is not IdentityOp:
            setattr(owner, name, TorchNorm)
    if config.context_parallel_size > 1:
        attention.core_attention = GatheringAttention
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TorchNorm)
