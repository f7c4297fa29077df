"""The modules of layers: Transformer Engine's on CUDA where it is installed, else Megatron's own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from megascore.mcore.compat import has_transformer_engine, submodules_of
from megascore.mcore.world.context_parallel import GatheringAttention

__all__ = ["TorchNorm", "block_spec", "uses_grouped_experts", "uses_transformer_engine"]


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
    """Return the modules that the layers of one pipeline chunk are built of.

    Args:
        config: Config of the whole model.
        device: Device that it will run on.
        chunk: Number of the virtual-pipeline chunk, None without virtual pipelining.

    Returns:
        The ``transformer_layer_spec`` of a ``GPTModel``.
    """
    if uses_transformer_engine(device, config.params_dtype):
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=chunk)
        if config.context_parallel_size > 1 and config.params_dtype == torch.float32:
            # Transformer Engine's kernels for context parallelism take 16 bits only.
            for layer in block.layer_specs:
                submodules_of(layer.submodules.self_attention).core_attention = GatheringAttention
        return block
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=chunk
    )
    for layer in block.layer_specs:
        _use_torch_modules(layer, context_parallel=config.context_parallel_size > 1)
    block.layer_norm = TorchNorm
    return block


def uses_grouped_experts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the experts of a layer are one grouped layer of Transformer Engine's, rather than a list of MLPs."""
    return uses_transformer_engine(device, dtype)


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers are Transformer Engine's: where it is installed and has kernels, so not in float64."""
    return device.type == "cuda" and dtype != torch.float64 and has_transformer_engine()


def _use_torch_modules(layer: Any, *, context_parallel: bool) -> None:
    """Change a layer's spec in place; the layers of a block share it, so it may have been changed already."""
    attention = submodules_of(layer.submodules.self_attention)
    for owner, name in (
        (layer.submodules, "input_layernorm"),
        (layer.submodules, "pre_mlp_layernorm"),
        (attention, "q_layernorm"),
        (attention, "k_layernorm"),
    ):
        if getattr(owner, name) is not IdentityOp:
            setattr(owner, name, TorchNorm)
    if context_parallel:
        attention.core_attention = GatheringAttention
