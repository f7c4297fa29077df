"""Measuring what the model does without each of its layers, and what several layers do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megascore.errors import ModelError
from megascore.hooks import SpanSimilarityHook
from megascore.hooks.measured import MeasuredHook
from megascore.kernels.pairs_of_rows import sum_of_cosines, sum_of_squared_differences, sum_of_squares
from megascore.mcore.pipeline.layers import is_transformer_layer
from megascore.mcore.pipeline.partial_passes import Ending, PartialPasses
from megascore.mcore.pipeline.schedule import MicroBatch, output_layers
from megascore.mcore.sites.inventory import decoder_of
from megascore.mcore.sites.masks import SequenceMask
from megascore.parallel.axes import Axis
from megascore.parallel.comm import agree, gather_objects
from megascore.runs.finiteness import has_bad_token
from megascore.runs.scoring_run import ScoringRun
from megascore.scores.assemble import layer_of
from megascore.sites.requests import ScoreRequest

__all__ = ["WithoutLayers"]

COLUMNS = (
    "tokens",
    "calls",
    "nats_added",
    "predicted",
    "squared_error",
    "squared_norm",
    "span_tokens",
    "span_calls",
    "cosines",
    "spoiled",
)
"""What is added up for each layer, each a sum over this rank's tokens or micro-batches; ``spoiled`` counts those in
which what the layer is given in the whole model is not finite, with a last row for the end of the model."""


class WithoutLayers:
    """Feeds those hooks of a run that no module calls, in micro-batches that go through the model again.

    For each micro-batch that is one forward pass, and, where a score needs the model without a layer, a pass from each
    layer to the end: of L layers (L + 1) / 2 whole passes together. Several scores share them. Beside the model there
    are in memory the hidden states of one micro-batch before each layer of the rank.
    """

    def __init__(self, chunks: Sequence[Any], run: ScoringRun) -> None:
        """Find the layers. Collective over the world.

        Args:
            chunks: The virtual-pipeline chunks of this rank, on which the run's hooks are.
            run: The run; its requests, the same on all ranks, say what is measured.

        Raises:
            ModelError: a span is longer than the model, or the model has layers of other kinds.
        """
        self._chunks = chunks
        self._scoring = run
        self._device: torch.device = next(chunks[0].parameters()).device
        self._hooks = [
            (layer_of(site.place.name), site.hook) for site in run.sites if isinstance(site.hook, MeasuredHook)
        ]
        requests = {request.method: request for request in run.requests if _is_measured(request)}
        self._computes_loss = "loss_without" in requests
        self._leaves_out = self._computes_loss or "output_error" in requests
        chunk_of_layer = _chunk_of_layer(chunks)
        self._num_layers = len(chunk_of_layer)
        spans = requests.get("span_similarity")
        self._span = None if spans is None else SpanSimilarityHook.span_of(dict(spans.options))
        agree("looking at the spans of layers", self._check_span)
        self._passes = PartialPasses(chunks, chunk_of_layer, self._device, loss=self._computes_loss)
        tensor = Axis(
            "tp",
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        context = Axis(
            "cp", parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        )
        splits = bool(chunks[0].config.sequence_parallel) and tensor.size > 1
        self._local_mask = SequenceMask(context, tensor if splits else None)
        # Where tensor-parallel ranks have parts of the hidden states, all of them have the loss of the whole: once.
        self._counts_loss = not splits or tensor.rank == 0

    @classmethod
    def of(cls, chunks: Sequence[Any], run: ScoringRun) -> WithoutLayers | None:
        """Return what feeds a run's hooks, or None where modules feed all of them. Collective over the world.

        Raises:
            ModelError: see the class.
        """
        if not any(map(_is_measured, run.requests)):
            return None
        return cls(chunks, run)

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
        """Measure micro-batches, and add what was found to the hooks of this rank's layers.

        Collective over tensor, context and pipeline ranks, with the same micro-batches, and over the ranks that
        exchange tokens, with equally many; at the end one all-reduce over the pipeline, also without micro-batches.

        Args:
            micro_batches: Token numbers, [B, S] int64 each, whole sequences.
            masks: Which tokens of each count, [B, S] bool each, best in host memory; None counts all.
        """
        table = torch.zeros(self._num_layers + 1, len(COLUMNS), dtype=torch.float64, device=self._device)
        sums = dict(zip(COLUMNS, table.unbind(1), strict=True))
        with self._scoring.paused(), output_layers(self._chunks, run=self._computes_loss):
            for number, tokens in enumerate(micro_batches):
                self._measure((tokens, None if masks is None else masks[number]), sums)
                # Not kept while other passes run.
                self._passes.before.clear()
        if self._passes.num_stages > 1:
            dist.all_reduce(table, group=parallel_state.get_pipeline_model_parallel_group())
        _blame_first_bad_layer(table, sums["spoiled"])
        for layer, hook in self._hooks:
            hook.feed({name: column[layer] for name, column in sums.items()})

    def _measure(self, micro_batch: MicroBatch, sums: dict[str, Tensor]) -> None:
        whole = self._passes.whole(micro_batch)
        mask = micro_batch[1]
        own_mask = None if mask is None else mask.to(self._device, non_blocking=True)
        inputs = {**self._passes.before, **({} if whole is None else {self._num_layers: whole.hidden_states})}
        for layer, hidden_states in inputs.items():
            sums["spoiled"][layer] += has_bad_token(hidden_states, self._own(own_mask, hidden_states))
        if self._span is not None:
            for first in range(self._num_layers - self._span + 1):
                self._add_span(first, first + self._span, whole, own_mask, sums)
        if not self._leaves_out:
            return
        norm = None if whole is None else sum_of_squares(whole.hidden_states, self._own(own_mask, whole.hidden_states))
        for layer in range(self._num_layers):
            without = self._passes.without(layer, micro_batch)
            if whole is not None and without is not None:
                assert norm is not None
                sums["squared_norm"][layer] += norm
                self._add_difference(layer, whole, without, own_mask, sums)

    def _add_difference(
        self, layer: int, whole: Ending, without: Ending, mask: Tensor | None, sums: dict[str, Tensor]
    ) -> None:
        """Add what a layer's absence changes at the end of the model, on a rank of the last stage."""
        own_mask = self._own(mask, whole.hidden_states)
        _count(layer, whole.hidden_states, own_mask, sums["tokens"], sums["calls"])
        sums["squared_error"][layer] += sum_of_squared_differences(whole.hidden_states, without.hidden_states, own_mask)
        if whole.losses is not None and without.losses is not None and self._counts_loss:
            sums["nats_added"][layer] += without.losses.nats - whole.losses.nats
            sums["predicted"][layer] += without.losses.num_tokens

    def _add_span(
        self, first: int, behind: int, whole: Ending | None, mask: Tensor | None, sums: dict[str, Tensor]
    ) -> None:
        """Add the cosines of one span, on the rank that has what its last layer returns.

        That is the input of the layer behind it. What goes into the span comes there from the rank that has it.
        """
        passes = self._passes
        begins, ends = passes.stage_of_layer(first), passes.stage_of_layer(behind)
        group = parallel_state.get_pipeline_model_parallel_group()
        if passes.stage == begins != ends:
            dist.send(passes.before[first].contiguous(), dst=passes.rank_of_stage(ends), group=group)
        if passes.stage != ends:
            return
        if behind < self._num_layers:
            after = passes.before[behind]
        else:
            assert whole is not None, "the last stage has the end of the model"
            after = whole.hidden_states
        before = passes.before[first] if begins == ends else torch.empty_like(after)
        if begins != ends:
            dist.recv(before, src=passes.rank_of_stage(begins), group=group)
        own_mask = self._own(mask, after)
        _count(first, after, own_mask, sums["span_tokens"], sums["span_calls"])
        sums["cosines"][first] += sum_of_cosines(before, after, own_mask)

    def _own(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """Return which of this rank's tokens count."""
        return None if mask is None else self._local_mask(mask, hidden_states)

    def _check_span(self) -> None:
        if self._span is not None and self._span > self._num_layers:
            raise ModelError(
                f"layers/span_similarity has span={self._span}, but the model has {self._num_layers} layers: choose a "
                "span that is no longer than the model."
            )


def _is_measured(request: ScoreRequest) -> bool:
    return issubclass(request.definition.hook, MeasuredHook)


def _count(layer: int, hidden_states: Tensor, mask: Tensor | None, tokens: Tensor, calls: Tensor) -> None:
    """Count tokens, and the call if there are any, as hooks do."""
    number = hidden_states.shape[:-1].numel() if mask is None else mask.sum()
    tokens[layer] += number
    calls[layer] += number > 0


def _blame_first_bad_layer(table: Tensor, spoiled: Tensor) -> None:
    """Where the whole model is not finite, let only layers from the first on that returns such a thing tell it.

    Else the first layer of all would be named, for without it the others are as bad. No wait for the device.
    """
    since = spoiled.cumsum(0)
    is_innocent = (since[-1] > 0) & (since[1:] == 0)
    table[:-1].masked_fill_(is_innocent[:, None], 0.0)


def _chunk_of_layer(chunks: Sequence[Any]) -> dict[int, int]:
    """Return, of all layers of the model, the number of their chunk in the pipeline. Collective over the world."""
    own = agree("looking for the layers", lambda: _own_layers(chunks))
    found: dict[int, int] = {}
    for numbers in gather_objects(own):
        found.update(numbers)
    if sorted(found) != list(range(len(found))):
        raise ModelError(f"the ranks together hold the layers {sorted(found)}: expected 0 to {len(found) - 1}.")
    return found


def _own_layers(chunks: Sequence[Any]) -> dict[int, int]:
    num_stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    stage: int = parallel_state.get_pipeline_model_parallel_rank()
    found = {}
    for number, chunk in enumerate(chunks):
        for _, block in decoder_of(chunk):
            for layer in block.layers:
                if not is_transformer_layer(layer):
                    raise ModelError(
                        f"{type(layer).__name__} is a layer that can't be left out: loss_without, output_error and "
                        "span_similarity take models of TransformerLayers alone. Score layers by block_similarity."
                    )
                found[layer.layer_number - 1] = number * num_stages + stage
    return found
