"""One pipeline chunk whose layers run one at a time, and the way of hidden states from chunk to chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.blockwise.cached_feed import CachedFeed
from megascore.blockwise.moving_weights import MovingWeights
from megascore.blockwise.stand_ins import ReturnForm
from megascore.capture.stores import TensorStore
from megascore.mcore.pipeline.layers import layers_of
from megascore.mcore.pipeline.schedule import LossSums, MicroBatch, empty_hidden_states, forward_step, output_layers
from megascore.runs.scoring_run import ScoringRun

__all__ = ["ChunkRunner"]


class ChunkRunner:
    """Runs the layers of one chunk of this rank, each over all micro-batches of the rank before the next one.

    What layers are given beside hidden states - rotary tables, masks - comes from a forward pass of the chunk itself,
    in which its layers only hand a mark through: so it is this stage's own, for each micro-batch and layer.
    """

    def __init__(
        self, chunk: Any, micro_batches: Sequence[MicroBatch], store: TensorStore, device: torch.device, *, loss: bool
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            chunk: A ``GPTModel``.
            micro_batches: All of this rank, in order; in host memory.
            store: Where hidden states wait.
            device: The compute device.
            loss: Whether `finish` computes the loss.
        """
        self._chunk = chunk
        self._micro_batches = micro_batches
        self._device = device
        self._computes_loss = loss
        self._layers = layers_of(chunk)
        # What lies outside of layers is on the device already.
        weights = MovingWeights(chunk, device)
        # Megatron's layers return hidden states and a context for cross attention; a decoder's context is None.
        form = ReturnForm((torch.empty(0), None))
        self._feed = CachedFeed(chunk, self._layers, len(micro_batches), self._forward, weights, store, form=form)
        self._received: Tensor | None = None
        self._run: ScoringRun | None = None

    @contextmanager
    def collecting(self) -> Iterator[Callable[[int], None]]:
        """Give a function that gets a micro-batch's input - receives it, or embeds it - and keeps it for the layers.

        Collective over the ranks that share the chunk; one that is not the first waits for `send` of the one before.
        """
        with torch.no_grad(), self._feed.collecting() as collect:

            def get(index: int) -> None:
                self._received = None if self._chunk.pre_process else self._receive(index)
                collect(index)

            try:
                yield get
            finally:
                self._forget_input()

    def send(self, index: int) -> None:
        """Give a micro-batch's hidden states to the next chunk, which is on another rank, and forget them here."""
        hidden = self._feed.hidden_states(index).contiguous()
        dist.send(
            hidden,
            dst=parallel_state.get_pipeline_model_parallel_next_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        self._feed.drop_hidden_states(index)

    @torch.no_grad()
    def run_layer(self, position: int, index: int, run: ScoringRun | None) -> None:
        """Run a layer on a micro-batch. Collective over the ranks that share the chunk.

        Args:
            position: Of the layer in this chunk.
            index: Of the micro-batch.
            run: Is told the micro-batch's mask.
        """
        with _masked(run, self._micro_batches[index][1]):
            call = self._feed.call(position, index)
            output = self._layers[position](*call.args, **call.kwargs)
        self._feed.keep(position, index, output)

    @torch.no_grad()
    def look_at_layer(self, position: int, index: int) -> None:
        """Run a layer on a micro-batch for what hooks see of it: its input stays for the next time.

        Collective over the ranks that share the chunk. Arguments as of `run_layer`.
        """
        call = self._feed.call(position, index)
        self._layers[position](*call.args, **call.kwargs)

    def mask_of(self, index: int) -> Tensor | None:
        """Return which tokens of a micro-batch count, bool [B, S]; None for all."""
        return self._micro_batches[index][1]

    @contextmanager
    def finishing(self, run: ScoringRun | None) -> Iterator[Callable[[int], LossSums | None]]:
        """Give a function that runs what follows the layers, for a micro-batch; it returns the loss if there is one.

        Of the last chunk, after its last layer. Collective over the ranks that share the chunk.
        """

        def finish(index: int) -> LossSums | None:
            result: Any = forward(index)
            output, losses_of = result
            losses: LossSums | None = losses_of(output, non_loss_data=True)
            return losses

        self._run = run
        try:
            with (
                torch.no_grad(),
                output_layers([self._chunk], run=self._computes_loss),
                self._feed.whole_passes() as forward,
            ):
                yield finish
        finally:
            self._run = None
            self._forget_input()

    def close(self) -> None:
        """Drop everything that waits."""
        self._feed.close()

    def _forward(self, index: int) -> tuple[Tensor, Any]:
        tokens, mask = self._micro_batches[index]
        if not self._chunk.pre_process:
            # Some size is asked of it, also where the layers do not run.
            received = self._received if self._received is not None else self._room_for(tokens)
            self._chunk.set_input_tensor(received)
        return forward_step(
            iter([(tokens, mask)]), self._chunk, device=self._device, compute_loss=self._computes_loss, run=self._run
        )

    def _receive(self, index: int) -> Tensor:
        received = self._room_for(self._micro_batches[index][0])
        dist.recv(
            received,
            src=parallel_state.get_pipeline_model_parallel_prev_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return received

    def _room_for(self, tokens: Tensor) -> Tensor:
        return empty_hidden_states(self._chunk.config, tuple(tokens.shape), self._device)

    def _forget_input(self) -> None:
        self._received = None
        if not self._chunk.pre_process:
            self._chunk.set_input_tensor(None)


def _masked(run: ScoringRun | None, mask: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if run is None else run.masked(mask)
