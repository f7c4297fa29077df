"""Weights of a model whose layers have them on the device only while they run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megascore.blockwise.moving_weights import MovingWeights
from megascore.errors import ModelError
from megascore.job.resolved import ModelForm
from megascore.mcore.models.empty_layers import built_empty, filled
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import is_transformer_layer, layers_of
from megascore.parallel.comm import world_rank

__all__ = ["build_for_blocks", "layer_present", "load_for_blocks", "whole_because"]

logger = logging.getLogger(__name__)


def build_for_blocks(source: ModelSource, form: ModelForm) -> list[Any]:
    """Build the chunks of this rank without weights; layers that are read one by one take no memory.

    On every rank; collective over the pipeline stages where embeddings are tied.

    Raises:
        MegascoreError: the model cannot be built.
    """
    if source.whole_because is not None:
        return form.build(source)
    try:
        with built_empty():
            return form.build(source)
    except RuntimeError as error:
        # What PyTorch raises where a value is asked of a tensor that has none.
        if form.device.type == "meta" or "meta" not in str(error):
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


def load_for_blocks(source: ModelSource, form: ModelForm, largest_token: int) -> list[Any]:
    """Build the chunks of this rank, and load what lies outside of their layers.

    Weights of layers are read when it is their turn. Where layers could not be built empty (see `whole_because`) they
    are loaded at once, and then wait in host memory; a warning says so.

    On every rank; collective over the pipeline stages where embeddings are tied.

    Args:
        source: Of the model.
        form: How it is built.
        largest_token: In the data.

    Raises:
        MegascoreError: the model cannot be built, weights are missing, or the data has other tokens.
    """
    chunks = build_for_blocks(source, form)
    reason = whole_because(source, chunks)
    if reason is not None and world_rank() == 0:
        logger.warning("run.blockwise: all weights of the model are on %s at first, as %s", form.device, reason)
    source.check_tokens(chunks, largest_token)
    source.load(chunks)
    for chunk in chunks:
        for layer in layers_of(chunk):
            if not _is_empty(layer):
                layer.to("cpu")
    return chunks


@contextmanager
def layer_present(source: ModelSource, chunk: nn.Module, layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a layer's weights on the device inside: read from the files, or brought from host memory. Not collective.

    Raises:
        ModelError: a file is missing or damaged: it has changed since the run began.
    """
    if _is_empty(layer):
        with filled(layer, device):
            source.load_layer(chunk, layer)
            yield
    else:
        with MovingWeights(layer, device).present(layer):
            yield


def _is_empty(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())
