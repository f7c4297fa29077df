"""A model whose layers have their weights on the device only while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megascore.capture.weights import MovingWeights
from megascore.mcore.blockwise.empty_layers import filled
from megascore.mcore.blockwise.layers import layers_of
from megascore.mcore.gpt import build_gpt
from megascore.mcore.huggingface.config import HuggingFaceModelConfig
from megascore.mcore.huggingface.load import load_layer, load_weights
from megascore.mcore.inputs import JobInputs
from megascore.mcore.sources.source import ModelSource
from megascore.scoring.config import JobConfig

__all__ = ["BlockwiseModel", "build_for_blocks", "load_for_blocks"]


@dataclass(frozen=True)
class BlockwiseModel:
    """The chunks of this rank, and how a layer gets its weights."""

    chunks: list[Any]
    present: Callable[[nn.Module], AbstractContextManager[None]]
    """Has a layer's weights on the device inside. Not collective."""


def build_for_blocks(config: JobConfig, source: ModelSource, device: torch.device) -> list[Any]:
    """Build the chunks of this rank without weights; layers that are read one by one take no memory.

    On every rank; collective over the pipeline stages where embeddings are tied.

    Raises:
        MegascoreError: the model cannot be built.
    """
    dtype, length = getattr(torch, config.model.dtype), config.data.sequence_length
    if source.layer_by_layer is None:
        return source.build(config.parallel, dtype, device, length)
    architecture = source.layer_by_layer.architecture
    return [*build_gpt(architecture, config.parallel, dtype, device, length, empty_layers=True)]


def load_for_blocks(config: JobConfig, inputs: JobInputs, device: torch.device) -> BlockwiseModel:
    """Build the model of a job, and load what lies outside of its layers.

    Weights of layers are read from a Hugging Face folder when it is their turn. From everywhere else the whole model is
    loaded first; its layers then wait in host memory.

    On every rank; collective over the pipeline stages where embeddings are tied.

    Raises:
        MegascoreError: the model cannot be built, or weights are missing.
    """
    source = inputs.source
    of_layers = source.layer_by_layer
    chunks = build_for_blocks(config, source, device)
    if of_layers is not None:
        load_weights(chunks, of_layers.config, of_layers.directory)
        return BlockwiseModel(chunks, lambda layer: _read(layer, of_layers.config, of_layers.directory, device))
    source.check_tokens(chunks, inputs.samples.largest_token)
    source.load(chunks)
    for chunk in chunks:
        for layer in layers_of(chunk):
            layer.to("cpu")
    return BlockwiseModel(chunks, lambda layer: MovingWeights(layer, device).present(layer))


@contextmanager
def _read(
    layer: nn.Module, config: HuggingFaceModelConfig, directory: str | Path, device: torch.device
) -> Iterator[None]:
    with filled(layer, device):
        load_layer(layer, config, directory)
        yield
