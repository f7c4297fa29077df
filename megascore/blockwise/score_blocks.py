"""Scoring a model one block at a time, with nothing but that block on the compute device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megascore.blockwise.cached_feed import CachedFeed
from megascore.blockwise.feeds import BlockFeed, FreshFeed
from megascore.blockwise.find_blocks import find_blocks
from megascore.blockwise.moving_weights import MovingWeights
from megascore.blockwise.offload_hooks import moving_hooks_silent
from megascore.blockwise.parts import ModelParts
from megascore.capture.block_inputs import device_of, run_model
from megascore.capture.halt_after import HaltAfter
from megascore.capture.nested import nested_leaves, nested_move_to
from megascore.capture.stores import HostStore, TensorStore
from megascore.capture.surroundings import measuring
from megascore.errors import ConfigError, DataError
from megascore.parallel.comm import agree, gather_objects
from megascore.runs.results import Results, conclude
from megascore.runs.scoring_run import ScoringRun
from megascore.runs.steps import run_steps
from megascore.scores.score_file import Scores
from megascore.sites.places import ModelView
from megascore.sites.requests import ScoreRequest
from megascore.sites.site import check_places, present_requests

__all__ = ["BlockwiseOptions", "score_blocks"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockwiseOptions:
    """How the blocks get their inputs and weights."""

    cache_block_outputs: bool = True
    """Feed each block what the block before returned; otherwise run the model up to each block."""
    device: torch.device | str | None = None
    """The compute device; that of the model if not given, the CPU for one without weights."""
    store: TensorStore | None = None
    """Where inputs wait; the host's memory if not given."""
    weights: str | Path | None = None
    """Checkpoint folder of weights that are on the meta device."""
    token_masks: Sequence[Tensor | None] | None = None
    """For each batch which tokens count, bool [B, S]; None counts all."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Entries for the score file."""


def score_blocks(
    view: ModelView,
    blocks: nn.Module | Sequence[nn.Module] | str,
    batches: Sequence[Any],
    requests: Sequence[ScoreRequest],
    options: BlockwiseOptions,
) -> Scores:
    """Return the scores of a plain model, of which one block at a time runs. Collective over the world.

    Args:
        view: The model.
        blocks: Its blocks, in order.
        batches: What the model is called with; a batch is a step.
        requests: What to score.
        options: How.

    Raises:
        ConfigError, DataError, ModelError: what is given does not fit; see `megascore.score_blockwise`.
    """
    model = view.modules[0]
    own_blocks = agree("looking for the blocks", lambda: find_blocks(model, blocks))
    agree("looking for the modules to score", lambda: check_places(view, requests))
    requests, not_scored = present_requests(view, requests)
    num_passes = agree("counting the batches", lambda: _num_passes(requests, batches))
    masks = agree("counting the masks", lambda: _masks(options.token_masks, len(batches)))
    _check_same_everywhere(len(batches))
    device = options.device if options.device is not None else device_of(model)
    weights = agree("looking for the weights", lambda: MovingWeights(model, device, options.weights))
    store = options.store if options.store is not None else HostStore()
    feed_class = CachedFeed if options.cache_block_outputs else FreshFeed

    def forward(index: int) -> object:
        return run_model(model, nested_move_to(batches[index], weights.device))

    feed = feed_class(model, own_blocks, len(batches), forward, weights, store)
    try:
        with measuring(model), moving_hooks_silent(model, weights.device):
            results = _Blockwise(ModelParts(view, own_blocks, requests), num_passes, masks, feed, weights).run()
    finally:
        feed.close()
    blockwise = {"cache_block_outputs": options.cache_block_outputs, "num_blocks": len(own_blocks)}
    return conclude(results, view, requests, len(batches), options.metadata, not_scored, blockwise)


class _Blockwise:
    """The loop over blocks, and what is outside of them at the end."""

    def __init__(
        self,
        parts: ModelParts,
        num_passes: Mapping[ScoreRequest, int],
        masks: Sequence[Tensor | None],
        feed: BlockFeed,
        weights: MovingWeights,
    ) -> None:
        self._parts = parts
        self._num_passes = num_passes
        self._masks = masks
        self._feed = feed
        self._weights = weights
        self._num_blocks = len(parts.modules) - 1

    def run(self) -> Results:
        """Score every block, then the rest of the model. Collective over the world."""
        results = Results()
        self._weights.check(module for modules in self._parts.modules for module in modules)
        for number in range(self._last_needed() + 1):
            if self._parts.requests[number] or self._feed.needs_every_block:
                results.update(self._score_block(number))
                logger.info("block %d of %d is done", number + 1, self._num_blocks)
        if self._parts.requests[-1]:
            results.update(self._score_outside())
        return results

    def _last_needed(self) -> int:
        """Return the last block that must run: all of them where something behind them is scored."""
        *inside, outside = self._parts.requests
        if outside and self._feed.needs_every_block:
            return self._num_blocks - 1
        return max((number for number, requests in enumerate(inside) if requests), default=-1)

    def _score_block(self, number: int) -> Results:
        (block,) = self._parts.modules[number]
        self._feed.prepare(number)

        def run_block(index: int, is_last_pass: bool) -> None:
            call = self._feed.call(number, index)
            output = block(*call.args, **call.kwargs)
            # In the passes before, its inputs are still needed.
            if is_last_pass:
                self._feed.keep(number, index, output)

        with self._weights.present(block), self._scoring(number) as runs:
            return self._go_over_batches(runs, run_block)

    def _score_outside(self) -> Results:
        """Run the model around its blocks, up to the last module to score: what follows need not be computed."""
        modules = self._parts.modules[-1]
        with (
            self._feed.whole_passes() as forward,
            self._weights.present(*modules),
            self._scoring(self._num_blocks) as runs,
            HaltAfter(modules) as until,
        ):
            return self._go_over_batches(runs, lambda index, _: until.run(forward, index))

    @contextmanager
    def _scoring(self, number: int) -> Iterator[dict[int, ScoringRun]]:
        """Put hooks on a part: one run for all scores that need the same number of passes over the batches."""
        by_passes: dict[int, list[ScoreRequest]] = {}
        for request in self._parts.requests[number]:
            by_passes.setdefault(self._num_passes[request], []).append(request)
        runs: dict[int, ScoringRun] = {}
        with ExitStack() as stack:
            for num_passes in sorted(by_passes):
                run = self._parts.scoring(number, by_passes[num_passes])
                assert run is not None
                runs[num_passes] = stack.enter_context(run)
            yield runs

    def _go_over_batches(self, runs: Mapping[int, ScoringRun], work: Callable[[int, bool], object]) -> Results:
        """Go over all batches as often as the scores need it.

        Args:
            runs: By the number of passes that their scores need; none where a block only runs for those after it.
            work: Runs one batch, given its number and whether this is the last pass.
        """
        num_passes = max(runs, default=1)
        for number in range(1, num_passes + 1):
            open_runs = [run for needed, run in runs.items() if number <= needed]
            run_batch = partial(self._run_batch, work, open_runs, number == num_passes)
            run_steps(range(len(self._masks)), run_batch, open_runs)
            if number in runs:
                runs[number].close()
        results = Results()
        for needed, run in runs.items():
            results.update(run.results(), needed)
        return results

    def _run_batch(
        self, work: Callable[[int, bool], object], runs: Sequence[ScoringRun], is_last_pass: bool, index: int
    ) -> None:
        for run in runs:
            run.token_mask = self._masks[index]
        work(index, is_last_pass)


def _num_passes(requests: Sequence[ScoreRequest], batches: Sequence[Any]) -> dict[ScoreRequest, int]:
    """Return how often each score goes over the batches: an iterative one until its iterations are done.

    Raises:
        DataError: there are no batches, or one is none.
        ConfigError: iterations are not a multiple of the number of batches.
    """
    if not batches:
        raise DataError("there are no batches: score_blockwise needs at least one.")
    for index, batch in enumerate(batches):
        if not nested_leaves(batch, Tensor):
            raise DataError(
                f"batch {index} is a {type(batch).__name__} without a tensor: expected a tensor, or a tuple, list or "
                "mapping of the model's arguments."
            )
    num_batches = len(batches)
    num_passes = {}
    for request in requests:
        iterations = request.num_steps or num_batches
        if iterations % num_batches:
            raise ConfigError(
                f"score {request.target}/{request.method} has iterations={iterations}, and there are {num_batches} "
                f"batches: each batch is one iteration, and all are used equally often, so take a multiple of "
                f"{num_batches}."
            )
        num_passes[request] = iterations // num_batches
    return num_passes


def _masks(masks: Sequence[Tensor | None] | None, num_batches: int) -> Sequence[Tensor | None]:
    """Return one mask for each batch.

    Raises:
        DataError: there are more or fewer.
    """
    if masks is None:
        return [None] * num_batches
    if len(masks) != num_batches:
        raise DataError(f"there are {len(masks)} token masks for {num_batches} batches: give one for each, or None.")
    return masks


def _check_same_everywhere(num_batches: int) -> None:
    numbers = gather_objects(num_batches)
    if len(set(numbers)) > 1:
        raise DataError(
            f"ranks have {numbers} batches: give each rank equally many, as all go from step to step together."
        )
