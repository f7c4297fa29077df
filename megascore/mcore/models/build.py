"""Models for a loop of one's own, built and loaded in one call."""

from __future__ import annotations

from typing import Any

import torch

from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.choose import model_source

__all__ = ["load_model"]


def load_model(
    config: ModelConfig, parallel: ParallelConfig, device: torch.device, max_sequence_length: int
) -> list[Any]:
    """Build the part of a model that this rank has, and load its weights.

    Inside a `parallel_world`, on every rank; collective over the pipeline stages where embeddings are tied.

    Args:
        config: Where the model comes from, and its data type.
        parallel: The layout that the parallel world was made with.
        device: Device of this rank.
        max_sequence_length: Longest sequence that will be run.

    Returns:
        The virtual-pipeline chunks of this rank, in evaluation mode; one without virtual pipelining. Where
        ``parallel.tensor`` does not divide the vocabulary, logits have padding at the end that is no token's; the
        ``vocab_size`` of a chunk is without it. Megatron's own loss does not leave it out, `forward_only` does.

    Raises:
        ConfigError: nothing says where the model comes from.
        ModelError: the checkpoint is missing, not supported, or does not hold the tensors that it should.
        LayoutError: the model does not split so.
    """
    source = model_source(config)
    source.check(parallel)
    chunks = source.build(parallel, getattr(torch, config.dtype), device, max_sequence_length)
    source.load(chunks)
    return chunks
