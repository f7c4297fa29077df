"""Megatron models from Hugging Face checkpoints, in any parallel layout."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megascore.errors import ConfigError, LayoutError, ModelError
from megascore.mcore.huggingface.config import HuggingFaceModelConfig, read_config
from megascore.mcore.huggingface.load import load_weights
from megascore.mcore.layout import check_divisible, layers_of_chunks
from megascore.mcore.spec import block_spec
from megascore.scoring.config import ModelConfig, ParallelConfig

__all__ = ["build_model", "load_model"]

logger = logging.getLogger(__name__)


def load_model(
    model_config: ModelConfig, parallel: ParallelConfig, device: torch.device, max_sequence_length: int
) -> list[GPTModel]:
    """Build the part of a model that this rank has, and load its weights.

    Inside a `parallel_world`. Collective over the pipeline stages where embeddings are tied.

    Args:
        model_config: Checkpoint directory and data type.
        parallel: The layout that the parallel world was made with.
        device: Device of this rank.
        max_sequence_length: Longest sequence that will be run.

    Returns:
        The virtual-pipeline chunks of this rank, in evaluation mode; one without virtual pipelining.

    Raises:
        ConfigError: ``model.hf`` is not given.
        ModelError: the checkpoint is missing, not supported, or does not hold the tensors that it should.
        LayoutError: the model does not split so.
    """
    if model_config.hf is None:
        raise ConfigError("model.hf is not given: expected a Hugging Face checkpoint directory.")
    config = read_config(model_config.hf)
    chunks = build_model(config, parallel, getattr(torch, model_config.dtype), device, max_sequence_length)
    num_bytes = load_weights(chunks, config, model_config.hf)
    logger.info("read %.1f MB of weights from %s", num_bytes / 1e6, model_config.hf)
    return chunks


def build_model(
    hf_config: HuggingFaceModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int,
) -> list[GPTModel]:
    """Build the part of a model that this rank has; its weights are not initialised.

    Inside a `parallel_world`. Collective over the pipeline stages where embeddings are tied.

    Args:
        hf_config: The whole model.
        parallel: The layout that the parallel world was made with.
        dtype: Of weights and activations; float64 holds throughout on the CPU.
        device: Device of this rank.
        max_sequence_length: Longest sequence that will be run.

    Returns:
        The virtual-pipeline chunks of this rank, in evaluation mode; one without virtual pipelining.

    Raises:
        LayoutError: the model does not split so.
        ModelError: the model has fewer positions than ``max_sequence_length``.
    """
    check_divisible(hf_config, parallel)
    if max_sequence_length > hf_config.max_positions:
        raise ModelError(
            f"data.sequence_length={max_sequence_length} is more than the model's {hf_config.max_positions} positions "
            "(max_position_embeddings): choose a shorter one."
        )
    config = _transformer_config(hf_config, parallel, dtype, max_sequence_length)
    chunks = [
        _build_chunk(hf_config, config, parallel, device, max_sequence_length, chunk)
        for chunk in range(parallel.virtual_pipeline)
    ]
    return [chunk.to(device).eval() for chunk in chunks]


def _build_chunk(
    hf_config: HuggingFaceModelConfig,
    config: TransformerConfig,
    parallel: ParallelConfig,
    device: torch.device,
    max_sequence_length: int,
    chunk: int,
) -> GPTModel:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    vp_stage = chunk if parallel.virtual_pipeline > 1 else None
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, device, vp_stage),
        vocab_size=hf_config.vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=stage == 0 and chunk == 0,
        post_process=stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1,
        share_embeddings_and_output_weights=hf_config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_theta,
        rope_scaling=hf_config.rope_llama3_factor is not None,
        rope_scaling_factor=hf_config.rope_llama3_factor or 1.0,
        seq_len_interpolation_factor=hf_config.rope_linear_factor,
        vp_stage=vp_stage,
    )


def _transformer_config(
    hf_config: HuggingFaceModelConfig, parallel: ParallelConfig, dtype: torch.dtype, max_sequence_length: int
) -> TransformerConfig:
    window = hf_config.sliding_window
    slides = window is not None and max_sequence_length > window
    if slides and parallel.context > 1:
        raise LayoutError(
            f"parallel.context={parallel.context} with sequences of {max_sequence_length}, longer than the model's "
            f"sliding window of {window}: set data.sequence_length to at most {window}, or parallel.context=1."
        )
    with warnings.catch_warnings():
        # A deprecation of its own default.
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        return TransformerConfig(**_config_values(hf_config, parallel, dtype, window if slides else None))


def _config_values(
    hf_config: HuggingFaceModelConfig, parallel: ParallelConfig, dtype: torch.dtype, window: int | None
) -> dict[str, Any]:
    return dict(
        num_layers=hf_config.num_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.ffn_size,
        num_attention_heads=hf_config.num_heads,
        num_query_groups=hf_config.num_kv_heads,
        kv_channels=hf_config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.norm_eps,
        qk_layernorm=hf_config.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # Megatron has one switch for the biases of the attention output and both MLP layers; those that the checkpoint
        # does not have are zero.
        add_bias_linear=hf_config.attention_output_bias or hf_config.mlp_bias,
        add_qkv_bias=hf_config.qkv_bias,
        # Megatron counts the keys before the query, transformers the query too.
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [int(slides) for slides in hf_config.sliding_layers],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(hf_config.num_layers, parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )


def _pipeline_layout(num_layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's description of an uneven pipeline, its chunks in the order of the layers; None for an even one."""
    if parallel.pipeline_layers is None:
        return None
    layers = layers_of_chunks(num_layers, parallel)
    layout = [["decoder"] * stage[chunk] for chunk in range(parallel.virtual_pipeline) for stage in layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
