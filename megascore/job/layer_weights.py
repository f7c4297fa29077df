"""A model whose layers have their weights on the device only while they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.config import JobConfig
from megascore.errors import ModelError
from megascore.job.inputs import JobInputs
from megascore.mcore.models.empty_layers import built_empty, filled
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import is_transformer_layer, layers_of
from megascore.parallel.comm import world_rank

__all__ = ["BlockwiseModel", "build_for_blocks", "load_for_blocks", "whole_because"]

logger = logging.getLogger(__name__)


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
    if source.whole_because is not None:
        return source.build(config.parallel, dtype, device, length)
    try:
        with built_empty():
            return source.build(config.parallel, dtype, device, length)
    except RuntimeError as error:
        # What PyTorch raises where a value is asked of a tensor that has none.
        if device.type == "meta" or "meta" not in str(error):
            raise
        raise ModelError(
            f"{source.name} asks for weights of layers, or moves them, while it builds: {error} With run.blockwise and "
            "model.load, layers get their weights when it is their turn, and the job moves the model to its device: "
            "let the function only build it, or score in a full pass (run.blockwise=false)."
        ) from error


def whole_because(source: ModelSource, chunks: Sequence[nn.Module]) -> str | None:
    """Return why all layers of this rank are on the device at first; None where they are not. Not collective.

    Args:
        source: Of the model.
        chunks: What `build_for_blocks` gave, on any device.
    """
    if source.whole_because is not None:
        return source.whole_because
    layers = [layer for chunk in chunks for layer in layers_of(chunk)]
    others = sorted({type(layer).__name__ for layer in layers if not is_transformer_layer(layer)})
    return f"it has layers that are no TransformerLayer: {', '.join(others)}" if others else None


def load_for_blocks(config: JobConfig, inputs: JobInputs, device: torch.device) -> BlockwiseModel:
    """Build the model of a job, and load what lies outside of its layers.

    Weights of layers are read when it is their turn. Where layers could not be built empty (see `whole_because`) they
    are loaded at once, and then wait in host memory; a warning says so.

    On every rank; collective over the pipeline stages where embeddings are tied.

    Raises:
        MegascoreError: the model cannot be built, or weights are missing.
    """
    source = inputs.source
    chunks = build_for_blocks(config, source, device)
    reason = whole_because(source, chunks)
    if reason is not None and world_rank() == 0:
        logger.warning("run.blockwise: all weights of the model are on %s at first, as %s", device, reason)
    source.check_tokens(chunks, inputs.samples.largest_token)
    source.load(chunks)
    presence: dict[int, Callable[[], AbstractContextManager[None]]] = {}
    for chunk in chunks:
        for layer in layers_of(chunk):
            if _is_empty(layer):
                presence[id(layer)] = partial(_read, source, chunk, layer, device)
            else:
                presence[id(layer)] = partial(MovingWeights(layer.to("cpu"), device).present, layer)
    return BlockwiseModel(chunks, lambda layer: presence[id(layer)]())


def _is_empty(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


@contextmanager
def _read(source: ModelSource, chunk: nn.Module, layer: nn.Module, device: torch.device) -> Iterator[None]:
    with filled(layer, device):
        source.load_layer(chunk, layer)
        yield
