"""Capture of what a layer of a Megatron model is given, in whatever layout the model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megascore.capture.block_inputs import BlockInputCapture, device_of
from megascore.capture.calls import StoredCalls
from megascore.capture.devices import usable_device
from megascore.capture.stores import TensorStore
from megascore.errors import ModelError
from megascore.mcore.pipeline.layers import order_of_layers
from megascore.mcore.pipeline.schedule import MicroBatch, forward_only, forward_step
from megascore.parallel.comm import agree

__all__ = ["capture_layer_inputs"]


@torch.no_grad()
def capture_layer_inputs(
    chunks: Sequence[Any],
    layer: int,
    micro_batches: Sequence[Tensor],
    *,
    store: TensorStore | None = None,
    device: torch.device | str | None = None,
) -> StoredCalls:
    """Run micro-batches through a Megatron model, and return what one of its layers is given on this rank.

    That is this rank's own: its part of each sequence under context and sequence parallelism, and nothing where another
    pipeline stage has the layer. With one stage each forward pass ends at the layer, on all ranks that share it at the
    same micro-batch. With several no pass is halted, as the stages behind would wait for what never comes: each goes
    through the whole pipeline.

    Collective over the world: every rank calls it, with the same micro-batches as those that share its samples, and
    with equally many as all others where the model has experts that are spread over data-parallel ranks.

    Args:
        chunks: The virtual-pipeline chunks of this rank.
        layer: Its global number, counted from 0.
        micro_batches: Token numbers, [B, S] int64 each, whole sequences.
        store: Where tensors wait; the host's memory if not given.
        device: Where the calls are given back; the layer's own device if not given.

    Returns:
        One call for each micro-batch, in order; none on ranks without the layer.

    Raises:
        ConfigError: there is no such device.
        ModelError: there is no such layer, or a pass did not reach it.
    """
    if device is not None:
        wanted = device
        agree("looking for the device", lambda: usable_device(wanted))
    order = order_of_layers(chunks)
    if not 0 <= layer < order.num_layers:
        raise ModelError(f"the model has no layer {layer}: its layers are 0 to {order.num_layers - 1}.")
    own = order.own_layer(layer)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert own is not None
        model_device = device_of(own)

        def run_chunk(tokens: Tensor) -> None:
            micro_batch: MicroBatch = (tokens, None)
            forward_step(iter([micro_batch]), chunks[0], device=model_device, compute_loss=False, run=None)

        with BlockInputCapture(own, store=store, device=device) as capture:
            for tokens in micro_batches:
                capture.run(run_chunk, tokens)
        return capture.inputs

    # One micro-batch at a time: a pass is then one call of the layer, whatever the schedule does with several.
    if own is None:
        for tokens in micro_batches:
            forward_only(chunks, [tokens], compute_loss=False)
        return StoredCalls(store)
    with BlockInputCapture(own, halt=False, store=store, device=device) as capture:
        for tokens in micro_batches:
            capture.run(forward_only, chunks, [tokens], False)
    return capture.inputs
