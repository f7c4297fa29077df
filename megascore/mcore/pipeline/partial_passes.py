"""Forward passes that begin in the middle of the model: from the hidden states before a layer, and without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.blockwise.stand_ins import forwards_replaced
from megascore.mcore.pipeline.schedule import LossSums, MicroBatch, empty_hidden_states, forward_step
from megascore.mcore.sites.inventory import decoder_of

__all__ = ["Ending", "PartialPasses"]

WHOLE = -1
"""In place of the layer that is left out, in the pass of the whole model."""


class Ending:
    """What a pass of one micro-batch comes to, on ranks of the last pipeline stage."""

    def __init__(self, hidden_states: Tensor, losses: LossSums | None) -> None:
        """Keep both.

        Args:
            hidden_states: What the last layer returns, before the final norm: [S here, B, H].
            losses: As of `forward_only`; None where they are not computed.
        """
        self.hidden_states = hidden_states
        self.losses = losses


class PartialPasses:
    """Runs single micro-batches through the pipeline, whole, and then without one layer after the other.

    A pass without a layer begins on the stage of that layer, with what the whole pass gave it, and goes to the end. So
    stages are busy with consecutive passes at the same time. All ranks do their part in one order - by pass, then by
    chunk of the pipeline - so that blocking messages cannot lock.
    """

    def __init__(
        self, chunks: Sequence[Any], chunk_of_layer: Mapping[int, int], device: torch.device, *, loss: bool
    ) -> None:
        """Prepare; nothing runs yet. Not collective.

        Args:
            chunks: The virtual-pipeline chunks of this rank.
            chunk_of_layer: Of all layers of the model, the number of the chunk in the pipeline.
            device: The compute device.
            loss: Whether the output layer runs, for the loss.
        """
        self._chunk_of_layer = chunk_of_layer
        self._device = device
        self._computes_loss = loss
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self.num_stages: int = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage: int = parallel_state.get_pipeline_model_parallel_rank()
        self._own = {number * self.num_stages + self.stage: chunk for number, chunk in enumerate(chunks)}
        self._last_chunk = self.num_stages * len(chunks) - 1
        self._layers = {
            number: [layer for _, block in decoder_of(chunk) for layer in block.layers]
            for number, chunk in self._own.items()
        }
        self.before: dict[int, Tensor] = {}
        """Hidden states before each layer of this rank, [S here, B, H], of the last micro-batch; to be cleared by
        who needs them no more."""

    def stage_of_layer(self, layer: int) -> int:
        """Return the pipeline stage that has a layer; of the number behind the last layer, that with the output."""
        if layer == len(self._chunk_of_layer):
            return self.num_stages - 1
        return self._chunk_of_layer[layer] % self.num_stages

    def rank_of_stage(self, stage: int) -> int:
        """Return the global rank that has another stage of this rank's pipeline."""
        return dist.get_global_rank(self._group, stage)

    def whole(self, micro_batch: MicroBatch) -> Ending | None:
        """Run the whole model, and keep the hidden states before each layer.

        Collective over tensor, context and pipeline ranks, and over those that exchange tokens.

        Returns:
            The end, on ranks of the last stage.
        """
        return self._run(micro_batch, WHOLE)

    def without(self, layer: int, micro_batch: MicroBatch) -> Ending | None:
        """Run the model without a layer, after `whole` of the same micro-batch. Collective as `whole` is."""
        return self._run(micro_batch, layer)

    def _run(self, micro_batch: MicroBatch, left_out: int) -> Ending | None:
        first = 0 if left_out == WHOLE else self._chunk_of_layer[left_out]
        ending = None
        for number in sorted(self._own):
            if number >= first:
                self._give_input(number, micro_batch, left_out, begins=number == first)
                ending = self._run_chunk(number, micro_batch, left_out)
        return ending

    def _give_input(self, number: int, micro_batch: MicroBatch, left_out: int, *, begins: bool) -> None:
        chunk = self._own[number]
        if chunk.pre_process:
            return
        if begins:
            # Layers before the one that is left out only hand this through.
            chunk.set_input_tensor(self.before[left_out])
            return
        received = empty_hidden_states(chunk.config, tuple(micro_batch[0].shape), self._device)
        previous = parallel_state.get_pipeline_model_parallel_prev_rank()
        dist.recv(received, src=previous, group=self._group)
        chunk.set_input_tensor(received)

    def _run_chunk(self, number: int, micro_batch: MicroBatch, left_out: int) -> Ending | None:
        chunk = self._own[number]
        with (
            forwards_replaced(self._layers[number], partial(self._run_layer, number, left_out)),
            _final_hidden_states(chunk) as caught,
        ):
            output, losses_of = forward_step(
                iter([micro_batch]), chunk, device=self._device, compute_loss=self._computes_loss, run=None
            )
        if not chunk.pre_process:
            chunk.set_input_tensor(None)
        if number == self._last_chunk:
            return Ending(caught[-1], losses_of(output, non_loss_data=True))
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=self._group)
        return None

    def _run_layer(self, chunk: int, left_out: int, position: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a layer's forward method."""
        layer = self._layers[chunk][position].layer_number - 1
        hidden = args[0] if args else kwargs["hidden_states"]
        if left_out == WHOLE:
            self.before[layer] = hidden
        elif layer <= left_out:
            # Hidden states, and a context for cross attention, which a decoder does not have.
            return self.before[left_out] if layer == left_out else hidden, None
        return forward(*args, **kwargs)


@contextmanager
def _final_hidden_states(chunk: Any) -> Iterator[list[Tensor]]:
    """Catch what goes into the final norm; or what layers return, where there is no such norm."""
    caught: list[Tensor] = []

    def before_norm(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else next(iter(kwargs.values())))

    def behind_layers(_module: Any, _args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for _, block in decoder_of(chunk):
        norm = getattr(block, "final_layernorm", None)
        handles.append(
            block.register_forward_hook(behind_layers)
            if norm is None
            else norm.register_forward_pre_hook(before_norm, with_kwargs=True)
        )
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
