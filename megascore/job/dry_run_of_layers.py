"""What a dry run of a job tells that runs one layer at a time."""

from __future__ import annotations

from typing import Any

import torch

from megascore.config import JobConfig
from megascore.job.layer_weights import whole_because
from megascore.job.planned import OneLayer, samples_of_rank
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import layers_of
from megascore.mcore.sites.view import MegatronModelView

__all__ = ["memory_of_one_layer"]


def memory_of_one_layer(config: JobConfig, source: ModelSource, view: MegatronModelView) -> OneLayer:
    """Return what a rank needs at a time for weights and hidden states. Not collective."""
    layers = [layer for chunk in view.modules for layer in layers_of(chunk)]
    in_layers: dict[int, Any] = {id(weight): weight for layer in layers for weight in layer.parameters()}
    everything = {id(weight): weight for chunk in view.modules for weight in chunk.parameters()}
    outside = sum(weight.nbytes for number, weight in everything.items() if number not in in_layers)
    largest = max((sum(weight.nbytes for weight in layer.parameters()) for layer in layers), default=0)
    layout, num_samples = view.layout, config.data.num_samples
    length = config.data.sequence_length // int(layout["context"])
    if layout["sequence"]:
        length //= int(layout["tensor"])
    of_sample = length * int(view.facts["hidden_size"]) * int(getattr(torch, config.model.dtype).itemsize)
    return OneLayer(
        weight_bytes=outside + largest,
        hidden_bytes_of_sample=of_sample,
        num_samples=None
        if num_samples is None
        else samples_of_rank(num_samples, config.run.global_batch_size, int(layout["data"])),
        whole_because=whole_because(source, view.modules),
        spools=config.run.spool_dir is not None,
    )
