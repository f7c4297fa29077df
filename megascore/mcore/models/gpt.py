"""Megatron models in any parallel layout, from a description of the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megascore.config import ParallelConfig
from megascore.errors import LayoutError, ModelError
from megascore.mcore.models.arguments import chunk_arguments, config_arguments, pipeline_layout
from megascore.mcore.models.empty_layers import on_device
from megascore.mcore.models.layout import check_divisible
from megascore.mcore.models.spec import block_spec, uses_grouped_experts
from megascore.weights.architecture import Architecture

__all__ = ["ArchitectureBuilder", "build_gpt"]


@dataclass(frozen=True)
class ArchitectureBuilder:
    """Builds a model from its description."""

    whole_because = None

    name: str
    architecture: Architecture

    @property
    def vocab_size(self) -> int | None:
        """Tokens that it has."""
        return self.architecture.vocab_size

    def identity(self) -> Mapping[str, Any]:
        """Return the description."""
        return {"architecture": self.architecture.as_json()}

    def check(self, parallel: ParallelConfig) -> None:
        """Check that the model splits so."""
        check_divisible(self.architecture, parallel)

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[GPTModel]:
        """Build the chunks of this rank, as `build_gpt` does."""
        return build_gpt(self.architecture, parallel, dtype, device, max_sequence_length)


def build_gpt(
    model: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int,
) -> list[GPTModel]:
    """Build the part of a model that this rank has; its weights are not initialised.

    Inside a `parallel_world`. Collective over the pipeline stages where embeddings are tied.

    Args:
        model: The whole model.
        parallel: The layout that the parallel world was made with.
        dtype: Of weights and activations; float64 holds throughout on the CPU.
        device: Device of this rank.
        max_sequence_length: Longest sequence that will be run.

    Returns:
        The virtual-pipeline chunks of this rank, in evaluation mode; one without virtual pipelining. Embedding and
        output layer are padded to a multiple of ``parallel.tensor``; ``vocab_size`` of a chunk is without the padding.

    Raises:
        LayoutError: the model does not split so.
        ModelError: the model has fewer positions than ``max_sequence_length``.
    """
    check_divisible(model, parallel)
    if max_sequence_length > model.max_positions:
        raise ModelError(
            f"data.sequence_length={max_sequence_length} is more than the model's {model.max_positions} positions "
            "(max_position_embeddings): choose a shorter one."
        )
    config = _transformer_config(model, parallel, dtype, device, max_sequence_length)
    spec = partial(block_spec, config, device)
    chunks = [_build_chunk(model, config, parallel, spec, chunk) for chunk in range(parallel.virtual_pipeline)]
    return [on_device(chunk, device).eval() for chunk in chunks]


def _build_chunk(
    model: Architecture, config: TransformerConfig, parallel: ParallelConfig, spec: Callable[..., Any], chunk: int
) -> GPTModel:
    part = chunk_arguments(parallel, chunk)
    built = GPTModel(
        config=config,
        transformer_layer_spec=spec(part["vp_stage"]),
        vocab_size=-(-model.vocab_size // parallel.tensor) * parallel.tensor,
        max_sequence_length=model.max_positions,
        **part,
        **model.gpt,
    )
    # Once it is built, Megatron no longer asks for it; what the embedding has beyond it is padding.
    built.vocab_size = model.vocab_size
    return built


def _transformer_config(
    model: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int,
) -> TransformerConfig:
    window = model.sliding_window
    slides = window is not None and max_sequence_length > window
    if slides and parallel.context > 1:
        raise LayoutError(
            f"parallel.context={parallel.context} with sequences of {max_sequence_length}, longer than the model's "
            f"sliding window of {window}: set data.sequence_length to at most {window}, or parallel.context=1."
        )
    with warnings.catch_warnings():
        # A deprecation of its own default.
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        try:
            return TransformerConfig(
                num_layers=model.num_layers,
                hidden_size=model.hidden_size,
                ffn_hidden_size=model.ffn_size,
                num_attention_heads=model.num_heads,
                num_query_groups=model.num_kv_heads,
                # Megatron counts the keys before the query, transformers the query too.
                window_size=(window - 1, 0) if slides and window is not None else None,
                window_attn_skip_freq=[int(slides) for slides in model.sliding_layers] if slides else None,
                pipeline_model_parallel_layout=pipeline_layout(parallel),
                **{
                    **model.transformer,
                    **_expert_arguments(model, device, dtype),
                    **config_arguments(parallel, dtype),
                },
            )
        except (ValueError, AssertionError) as error:
            raise ModelError(f"Megatron-Core does not build this {model.model_type} model so: {error}") from error


def _expert_arguments(model: Architecture, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if model.experts is None:
        return {}
    layers = model.experts.layers
    return {
        "num_moe_experts": model.experts.num_experts,
        "moe_ffn_hidden_size": model.experts.ffn_size,
        # One number for all-alike layers, for Megatron names the weights of mixed ones otherwise in its checkpoints.
        "moe_layer_freq": 1 if all(layers) else [int(has_experts) for has_experts in layers],
        "moe_grouped_gemm": uses_grouped_experts(device, dtype),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
