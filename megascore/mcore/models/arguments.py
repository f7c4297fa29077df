"""Arguments of Megatron's classes that follow from a parallel layout and a data type, whatever the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megascore.config import ParallelConfig
from megascore.mcore.models.layout import layers_of_chunks

__all__ = ["chunk_arguments", "config_arguments", "pipeline_layout"]


def config_arguments(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return fields of a ``TransformerConfig`` for scoring; the model is of one type throughout, not initialised."""
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "perform_initialization": False,
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def pipeline_layout(parallel: ParallelConfig) -> list[list[str]] | None:
    """Return Megatron's description of an uneven pipeline, its chunks in the order of the layers; None for an even one.

    Raises:
        LayoutError: a stage has fewer layers than chunks.
    """
    if parallel.pipeline_layers is None:
        return None
    layers = layers_of_chunks(sum(parallel.pipeline_layers), parallel)
    layout = [["decoder"] * stage[chunk] for chunk in range(parallel.virtual_pipeline) for stage in layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def chunk_arguments(parallel: ParallelConfig, chunk: int) -> dict[str, Any]:
    """Return the arguments of a model that say which chunk of it this rank builds; inside a `parallel_world`."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {
        "pre_process": stage == 0 and chunk == 0,
        "post_process": stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1,
        "vp_stage": chunk if parallel.virtual_pipeline > 1 else None,
    }
