"""A job that runs one layer at a time over all samples, in any parallel layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from megascore.capture.stores import HostStore, SpoolStore, TensorStore
from megascore.config import JobConfig, RunConfig
from megascore.data import MicroBatches
from megascore.job.done_blocks import DoneBlocks, check_done
from megascore.job.inputs import JobInputs
from megascore.job.layer_weights import BlockwiseModel, load_for_blocks
from megascore.job.parts import ModelParts
from megascore.job.steps import LossTotal, progress_entries, progress_facts, slices_of_step
from megascore.mcore.pipeline.chunk import ChunkRunner
from megascore.mcore.pipeline.layers import LayerOrder, order_of_layers
from megascore.mcore.sites.view import MegatronModelView
from megascore.parallel.comm import agree, max_over_world, world_rank
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.snapshot import Snapshot
from megascore.runs.progress import ScoringProgress
from megascore.runs.results import Results, run_metadata
from megascore.scores.assemble import assemble_scores
from megascore.scores.score_file import Scores
from megascore.sites.requests import ScoreRequest, check_num_steps
from megascore.sites.site import check_places, present_requests

__all__ = ["run_blockwise"]


def run_blockwise(
    config: JobConfig,
    inputs: JobInputs,
    requests: Sequence[ScoreRequest],
    device: torch.device,
    console: Console,
    checkpoints: Checkpointer | None,
    snapshot: Snapshot | None,
) -> Scores:
    """Return the scores of a job, the same as of a full pass. Collective over the world.

    Args:
        config: The job.
        inputs: Its samples.
        requests: What to score.
        device: Of this rank.
        console: Where rank 0 shows how far it is.
        checkpoints: Where the run saves; None for a run that does not.
        snapshot: What it goes on from.

    Raises:
        MegascoreError: the model, its layers, the scores or the checkpoint do not fit.
        Preempted: a signal came, and everything is saved.
    """
    model = agree("loading the model", lambda: load_for_blocks(config, inputs, device))
    agree("checking the scores", lambda: check_num_steps(requests, inputs.total_steps))
    view = MegatronModelView(model.chunks)
    agree("looking for the modules to score", lambda: check_places(view, requests))
    requests = present_requests(view, requests)
    order = order_of_layers(model.chunks)
    parts, done = ModelParts(view, order, requests), DoneBlocks(snapshot)
    check_done(done, order, parts, device)
    if checkpoints is not None:
        facts = {**progress_facts(config), "total_blocks": order.num_layers}
        checkpoints.begin(inputs.total_steps, snapshot, facts)
    loss = LossTotal(device)
    if snapshot is not None:
        loss.restore(snapshot.sums["loss"])
    store = agree("making the spool folder", lambda: _make_store(config.run))
    try:
        loop = _LayerLoop(config, inputs, model, order, parts, store, loss, device)
        results = loop.run(console, checkpoints, done)
    finally:
        store.close()
    results.require_data()
    own = {**inputs.metadata(config), "loss": loss.mean() if config.run.loss else None}
    own["blockwise"] = {"cache_block_outputs": True, "num_blocks": order.num_layers}
    states = dict(sorted(results.states.items()))
    return assemble_scores(requests, states, results.scores, run_metadata(view, inputs.total_steps, own))


class _LayerLoop:
    """All ranks go through all layers together, whoever has them, and meet before each step of each layer.

    So none of them waits longer than a step takes, and all of them know when to save or to stop.
    """

    def __init__(
        self,
        config: JobConfig,
        inputs: JobInputs,
        model: BlockwiseModel,
        order: LayerOrder,
        parts: ModelParts,
        store: TensorStore,
        loss: LossTotal,
        device: torch.device,
    ) -> None:
        self._config = config
        self._samples = inputs.samples
        self._total_steps = inputs.total_steps
        self._model = model
        self._order = order
        self._parts = parts
        self._loss = loss
        of_rank: list[slice] = []
        self._indices: list[list[int]] = []
        """Of each step, which micro-batches this rank runs."""
        for step in range(self._total_steps):
            slices = slices_of_step(config, step, self._samples)
            self._indices.append(list(range(len(of_rank), len(of_rank) + len(slices))))
            of_rank.extend(slices)
        micro_batches = MicroBatches(self._samples, of_rank)
        self._runners = {
            number: ChunkRunner(chunk, micro_batches, store, device, loss=config.run.loss)
            for number, chunk in order.own.items()
        }
        self._has_end = config.run.loss or bool(parts.requests_outside)
        self._checkpoints: Checkpointer | None = None
        self._done = DoneBlocks()
        self._progress: ScoringProgress
        self._tokens_of_parts = 0

    def run(self, console: Console, checkpoints: Checkpointer | None, done: DoneBlocks) -> Results:
        """Go through the layers that are left; before them those that are done run once more, for their outputs."""
        self._checkpoints, self._done = checkpoints, done
        num_layers = self._order.num_layers
        num_parts = num_layers + self._has_end
        tokens = self._config.run.global_batch_size * self._config.data.sequence_length
        done_steps = num_parts * self._total_steps if done.num_blocks > num_layers else 0
        with ScoringProgress(
            num_parts * self._total_steps,
            tokens,
            enabled=world_rank() == 0,
            done_steps=done_steps,
            console=console,
        ) as self._progress:
            # Else all was done, but for writing the result.
            if done.num_blocks <= num_layers:
                for layer in range(num_layers):
                    self._enter_chunk_of(layer)
                    self._run_layer(layer, is_scored=layer >= done.num_blocks)
                self._run_end()
            self._meet(self._total_steps, is_last=True)
        for runner in self._runners.values():
            runner.close()
        return done.results

    def _enter_chunk_of(self, layer: int) -> None:
        """At the first layer of a chunk: hand hidden states on from the chunk before, micro-batch by micro-batch."""
        chunk, position = self._order.place_of(layer)
        if position > 0:
            return
        # With one stage there is one chunk; else a rank never has two that follow each other.
        before, own = self._runners.get(chunk - 1), self._runners.get(chunk)
        with nullcontext() if own is None else own.collecting() as get_input:
            for indices in self._steps(counts=False):
                for index in indices:
                    if before is not None:
                        before.send(index)
                    if get_input is not None:
                        get_input(index)
        if before is not None:
            before.close()

    def _run_layer(self, layer: int, *, is_scored: bool) -> None:
        chunk, position = self._order.place_of(layer)
        runner, module = self._runners.get(chunk), self._order.own_layer(layer)
        with ExitStack() as stack:
            agree(f"reading the weights of layer {layer}", lambda: self._bring(module, stack))
            run = self._parts.scoring_layer(layer) if is_scored else None
            if run is not None:
                stack.enter_context(run)
            for indices in self._steps():
                if runner is not None:
                    for index in indices:
                        runner.run_layer(position, index, run)
                if run is not None:
                    run.step()
            if is_scored:
                self._done.add(Results() if run is None else run.results())
        if is_scored:
            self._meet(self._total_steps)

    def _run_end(self) -> None:
        """Run what follows the last layer: its norm, and the loss."""
        if not self._has_end:
            self._done.add(Results())
            return
        runner = self._runners.get(len(self._order.layers_of_chunk) - 1)
        with ExitStack() as stack:
            run = self._parts.scoring_outside()
            if run is not None:
                stack.enter_context(run)
            finish = None if runner is None else stack.enter_context(runner.finishing(run))
            for indices in self._steps():
                if finish is not None:
                    for losses in filter(None, map(finish, indices)):
                        self._loss.add(losses.nats, losses.num_tokens)
                if run is not None:
                    run.step()
            self._done.add(Results() if run is None else run.results())

    def _bring(self, layer: nn.Module | None, stack: ExitStack) -> None:
        if layer is not None:
            stack.enter_context(self._model.present(layer))

    def _steps(self, *, counts: bool = True) -> Iterator[list[int]]:
        """Give the micro-batches of each step, when all ranks have come to it. Collective over the world."""
        batch_size = self._config.run.global_batch_size
        for step in range(self._total_steps):
            self._meet(step)
            yield self._indices[step]
            if counts:
                num_tokens = self._samples.num_tokens(slice(step * batch_size, (step + 1) * batch_size))
                self._tokens_of_parts += num_tokens
                # Tokens of the whole model: each part of it is a fraction of the work on them.
                whole = self._tokens_of_parts // (self._order.num_layers + self._has_end)
                self._progress.advance(whole - self._progress.tokens)

    def _meet(self, step: int, *, is_last: bool = False) -> None:
        if self._checkpoints is None:
            max_over_world([0])
            return
        entries = {**progress_entries(self._progress, self._progress.tokens), "step": step}
        self._checkpoints.between_steps(self._done, self._done.cursor, self._sums, is_last=is_last, progress=entries)

    def _sums(self) -> Mapping[str, Tensor]:
        # A loss is complete with the last block; before that a stopped run begins it again.
        whole = self._loss.sums() if self._done.num_blocks > self._order.num_layers else {"loss": torch.zeros(2)}
        return {**whole, **self._done.merged_scores()}


def _make_store(run: RunConfig) -> TensorStore:
    if run.spool_dir is None:
        return HostStore()
    return SpoolStore(Path(run.spool_dir), int(run.spool_memory_gb * 1e9))
