"""What a dry run of a job tells that runs one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megascore.config import JobConfig
from megascore.hooks import ForwardHook
from megascore.job.layer_weights import whole_because
from megascore.job.planned import OneLayer, samples_of_rank
from megascore.mcore.models.empty_layers import filled
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import layers_of
from megascore.mcore.sites.view import MegatronModelView
from megascore.sites.places import Place
from megascore.sites.requests import ScoreRequest

__all__ = ["ViewOfEmptyLayers", "memory_of_one_layer"]


class ViewOfEmptyLayers(MegatronModelView):
    """A model whose layers have weights, of no value, only while a hook is made for them."""

    def __init__(self, chunks: Sequence[nn.Module], device: torch.device) -> None:
        """Find what the model has.

        Args:
            chunks: Of this rank, with layers that are empty or not.
            device: The compute device.
        """
        super().__init__(chunks)
        self._device = device

    def make_hook(self, request: ScoreRequest, place: Place) -> ForwardHook:
        """Return a fresh hook for one score at ``place``; collective where making it is (see `build_sites`)."""
        with filled(place.module, self._device):
            return super().make_hook(request, place)


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
