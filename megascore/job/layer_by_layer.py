"""A job that runs one layer at a time over all samples, in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from megascore.blockwise.parts import ModelParts
from megascore.capture.stores import TensorStore
from megascore.data import MicroBatches
from megascore.job.done_blocks import DoneBlocks, check_done
from megascore.job.inputs import JobInputs
from megascore.job.layer_weights import layer_present, load_for_blocks
from megascore.job.loss import LossTotal
from megascore.job.watch import Watch
from megascore.mcore.pipeline.chunk import ChunkRunner
from megascore.mcore.pipeline.layers import LayerOrder, order_of_layers
from megascore.mcore.sites.view import MegatronModelView
from megascore.parallel.comm import agree, max_over_world
from megascore.runs.progress import ScoringProgress
from megascore.runs.results import Results, conclude
from megascore.runs.scoring_run import ScoringRun
from megascore.runs.steps import Cursor, run_steps
from megascore.scores.score_file import Scores
from megascore.sites.site import check_places, present_requests

__all__ = ["run_layer_by_layer"]


def run_layer_by_layer(inputs: JobInputs, watch: Watch, make_store: Callable[[], TensorStore]) -> Scores:
    """Return the scores of a job, the same as of a full pass. Collective over the world.

    Args:
        inputs: The model, the samples, and what is scored.
        watch: What happens between steps.
        make_store: Returns where hidden states wait between two layers.

    Raises:
        MegascoreError: the model, its layers, the scores or the checkpoint do not fit.
        Preempted: a signal came, and everything is saved.
    """
    source, form = inputs.source, inputs.form
    chunks = agree("loading the model", lambda: load_for_blocks(source, form, inputs.samples.largest_token))
    view = MegatronModelView(chunks)
    agree("looking for the modules to score", lambda: check_places(view, inputs.requests))
    requests, not_scored = present_requests(view, inputs.requests)
    order = order_of_layers(chunks)
    parts = ModelParts(view, [order.own_layer(layer) for layer in range(order.num_layers)], requests)
    done = DoneBlocks(watch.snapshot)
    check_done(done, order, parts, form.device)
    watch.begin(inputs.total_steps, total_blocks=order.num_layers)
    loss = LossTotal(form.device)
    if watch.snapshot is not None:
        loss.restore(watch.snapshot.sums["loss"])
    store = agree("making the spool folder", make_store)
    try:
        _LayerLoop(inputs, order, parts, store, loss, watch, done).run()
    finally:
        store.close()
    metadata = {**inputs.metadata, "loss": loss.mean() if inputs.computes_loss else None}
    blockwise = {"cache_block_outputs": True, "num_blocks": order.num_layers}
    return conclude(
        done.results,
        view,
        requests,
        inputs.total_steps,
        metadata,
        not_scored,
        blockwise,
        keep_statistics=inputs.keep_statistics,
    )


class _LayerLoop:
    """All ranks go through all layers together, whoever has them, and meet before each step of each layer.

    So none of them waits longer than a step takes, and all of them know when to save or to stop.
    """

    def __init__(
        self,
        inputs: JobInputs,
        order: LayerOrder,
        parts: ModelParts,
        store: TensorStore,
        loss: LossTotal,
        watch: Watch,
        done: DoneBlocks,
    ) -> None:
        self._inputs = inputs
        self._order = order
        self._parts = parts
        self._loss = loss
        self._watch = watch
        self._done = done
        samples, of_rank = inputs.samples, list[slice]()
        self._indices: list[list[int]] = []
        """Of each step, which micro-batches this rank runs."""
        for step in range(inputs.total_steps):
            slices = inputs.share.micro_batches(step, samples.num_samples)
            self._indices.append(list(range(len(of_rank), len(of_rank) + len(slices))))
            of_rank.extend(slices)
        micro_batches = MicroBatches(samples, of_rank)
        self._runners = {
            number: ChunkRunner(chunk, micro_batches, store, inputs.form.device, loss=inputs.computes_loss)
            for number, chunk in order.own.items()
        }
        self._has_end = inputs.computes_loss or bool(parts.requests[-1])
        self._num_parts = order.num_layers + self._has_end
        self._progress: ScoringProgress
        self._tokens_of_parts = 0

    def run(self) -> None:
        """Go through the layers that are left; before them those that are done run once more, for their outputs."""
        num_layers, num_done = self._order.num_layers, self._done.num_blocks
        total = self._num_parts * self._inputs.total_steps
        # All may be done, but for writing the result.
        is_done = num_done > num_layers
        tokens_per_step = self._inputs.share.global_batch_size * self._inputs.form.sequence_length
        with self._watch.progress(total, tokens_per_step, total if is_done else 0) as self._progress:
            if not is_done:
                for layer in range(num_layers):
                    self._enter_chunk_of(layer)
                    self._run_layer(layer, is_scored=layer >= num_done)
                self._run_end()
            self._meet(self._inputs.total_steps, is_last=True)
        for runner in self._runners.values():
            runner.close()

    def _enter_chunk_of(self, layer: int) -> None:
        """At the first layer of a chunk: hand hidden states on from the chunk before, micro-batch by micro-batch."""
        chunk, position = self._order.place_of(layer)
        if position > 0:
            return
        # With one stage there is one chunk; else a rank never has two that follow each other.
        before, own = self._runners.get(chunk - 1), self._runners.get(chunk)
        with nullcontext() if own is None else own.collecting() as get_input:

            def hand_on(index: int) -> None:
                if before is not None:
                    before.send(index)
                if get_input is not None:
                    get_input(index)

            self._go_over(hand_on, counts=False)
        if before is not None:
            before.close()

    def _run_layer(self, layer: int, *, is_scored: bool) -> None:
        chunk, position = self._order.place_of(layer)
        runner = self._runners.get(chunk)
        with ExitStack() as stack:
            agree(f"reading the weights of layer {layer}", lambda: self._bring(layer, stack))
            run = self._parts.scoring(layer) if is_scored else None
            if run is not None:
                stack.enter_context(run)

            def run_layer(index: int) -> None:
                if runner is not None:
                    runner.run_layer(position, index, run)

            self._go_over(run_layer, run)
            if is_scored:
                self._done.add(Results() if run is None else run.results())
        if is_scored:
            self._meet(self._inputs.total_steps)

    def _run_end(self) -> None:
        """Run what follows the last layer: its norm, and the loss."""
        if not self._has_end:
            self._done.add(Results())
            return
        runner = self._runners.get(len(self._order.layers_of_chunk) - 1)
        with ExitStack() as stack:
            run = self._parts.scoring(self._order.num_layers)
            if run is not None:
                stack.enter_context(run)
            finish = None if runner is None else stack.enter_context(runner.finishing(run))

            def run_end(index: int) -> None:
                losses = None if finish is None else finish(index)
                if losses is not None:
                    self._loss.add(losses)

            self._go_over(run_end, run)
            self._done.add(Results() if run is None else run.results())

    def _bring(self, layer: int, stack: ExitStack) -> None:
        module = self._order.own_layer(layer)
        if module is not None:
            chunk = self._order.own[self._order.place_of(layer)[0]]
            stack.enter_context(layer_present(self._inputs.source, chunk, module, self._inputs.form.device))

    def _go_over(self, work: Callable[[int], object], run: ScoringRun | None = None, *, counts: bool = True) -> None:
        """Do ``work`` with each of this rank's micro-batches, step by step, as all other ranks do with theirs."""

        def run_step(step: int) -> None:
            for index in self._indices[step]:
                work(index)

        steps, runs = range(self._inputs.total_steps), [] if run is None else [run]
        run_steps(steps, run_step, runs, before=self._meet, after=self._count if counts else None)

    def _count(self, step: int) -> None:
        self._tokens_of_parts += self._inputs.samples.num_tokens(self._inputs.share.samples(step))
        # Tokens of the whole model: each part of it is a fraction of the work on them.
        self._progress.advance(self._tokens_of_parts // self._num_parts - self._progress.tokens)

    def _meet(self, step: int, *, is_last: bool = False) -> None:
        if self._watch.checkpoints is None:
            max_over_world([0])
        done = self._done
        cursor = Cursor(step, done.num_blocks, list(self._order.own.values()))
        self._watch.between(cursor, self._progress.tokens, done, done.cursor, self._sums, is_last=is_last)

    def _sums(self) -> Mapping[str, Tensor]:
        # A loss is complete with the last block; before that a stopped run begins it again.
        whole = self._loss.sums() if self._done.num_blocks > self._order.num_layers else {"loss": torch.zeros(2)}
        return {**whole, **self._done.merged_scores()}
