"""Scoring a model one block at a time, with nothing but that block on the compute device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megascore.blockwise.block_views import PartView, find_blocks, places_by_block
from megascore.blockwise.cached_feed import CachedFeed
from megascore.blockwise.feeds import BlockFeed, FreshFeed
from megascore.blockwise.moving_weights import MovingWeights
from megascore.capture.block_inputs import device_of, run_model
from megascore.capture.halt_after import HaltAfter
from megascore.capture.nested import nested_leaves, nested_move_to
from megascore.capture.stores import HostStore, TensorStore
from megascore.capture.surroundings import measuring
from megascore.errors import ConfigError, DataError
from megascore.parallel.comm import agree, gather_objects
from megascore.runs.results import Results, run_metadata
from megascore.runs.scoring_run import ScoringRun
from megascore.scores.assemble import assemble_scores
from megascore.scores.score_file import Scores
from megascore.sites.places import ModelView, Place
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
    requests = present_requests(view, requests)
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
        with measuring(model):
            results = _Blockwise(view, own_blocks, num_passes, masks, feed, weights).run()
    finally:
        feed.close()
    results.require_data()
    own = {**run_metadata(view, len(batches), options.metadata), **_counts(results, num_passes)}
    own["blockwise"] = {"cache_block_outputs": options.cache_block_outputs, "num_blocks": len(own_blocks)}
    return assemble_scores(requests, results.states, results.scores, own)


class _Blockwise:
    """The loop over blocks, and what is outside of them at the end."""

    def __init__(
        self,
        view: ModelView,
        blocks: Sequence[nn.Module],
        num_passes: Mapping[ScoreRequest, int],
        masks: Sequence[Tensor | None],
        feed: BlockFeed,
        weights: MovingWeights,
    ) -> None:
        self._view = view
        self._blocks = blocks
        self._num_passes = num_passes
        self._masks = masks
        self._feed = feed
        self._weights = weights
        inside, outside = places_by_block(view.places, blocks)
        self._inside = [self._wanted(places) for places in inside]
        self._outside = self._wanted(outside)

    def run(self) -> Results:
        """Score every block, then the rest of the model. Collective over the world."""
        results = Results()
        self._weights.check([*self._blocks, *(place.module for place in self._outside)])
        for number in range(self._last_needed() + 1):
            if self._inside[number] or self._feed.needs_every_block:
                results.update(self._score_block(number))
                logger.info("block %d of %d is done", number + 1, len(self._blocks))
        if self._outside:
            results.update(self._score_outside())
        return Results(dict(sorted(results.states.items())), results.scores)

    def _score_block(self, number: int) -> Results:
        block, places = self._blocks[number], self._inside[number]
        self._feed.prepare(number)
        with self._weights.present(block), self._scoring((block,), places) as runs:
            total = max(runs, default=1)
            for pass_number in range(1, total + 1):
                for index, mask in enumerate(self._masks):
                    _set_mask(runs, mask)
                    call = self._feed.call(number, index)
                    output = block(*call.args, **call.kwargs)
                    # Before that its inputs are still needed.
                    if pass_number == total:
                        self._feed.keep(number, index, output)
                    del call, output
                    _step(runs, pass_number)
                _close_done(runs, pass_number)
            return _results_of(runs)

    def _score_outside(self) -> Results:
        """Run the model around its blocks, up to the last module to score: what follows need not be computed."""
        modules = list({id(place.module): place.module for place in self._outside}.values())
        with (
            self._feed.whole_passes() as forward,
            self._weights.present(*modules),
            self._scoring(modules, self._outside) as runs,
            HaltAfter(modules) as until,
        ):
            for pass_number in range(1, max(runs) + 1):
                for index, mask in enumerate(self._masks):
                    _set_mask(runs, mask)
                    until.run(forward, index)
                    _step(runs, pass_number)
                _close_done(runs, pass_number)
            return _results_of(runs)

    @contextmanager
    def _scoring(self, modules: Sequence[nn.Module], places: Sequence[Place]) -> Iterator[dict[int, ScoringRun]]:
        """Put hooks on places: one run for all scores that need the same number of passes over the batches."""
        kinds = {place.kind for place in places}
        requests: dict[int, list[ScoreRequest]] = {}
        for request, num_passes in self._num_passes.items():
            if request.kind in kinds:
                requests.setdefault(num_passes, []).append(request)
        view = PartView(self._view, modules, places)
        with ExitStack() as stack:
            yield {n: stack.enter_context(ScoringRun(view, requests[n])) for n in sorted(requests)}

    def _wanted(self, places: Sequence[Place]) -> tuple[Place, ...]:
        kinds = {request.kind for request in self._num_passes}
        return tuple(place for place in places if place.kind in kinds)

    def _last_needed(self) -> int:
        """Return the last block that must run: all of them where something behind them is scored."""
        if self._outside and self._feed.needs_every_block:
            return len(self._blocks) - 1
        return max((number for number, places in enumerate(self._inside) if places), default=-1)


def _set_mask(runs: Mapping[int, ScoringRun], mask: Tensor | None) -> None:
    for run in runs.values():
        run.token_mask = mask


def _step(runs: Mapping[int, ScoringRun], pass_number: int) -> None:
    """End a step of every run that this pass is for."""
    for num_passes, run in runs.items():
        if pass_number <= num_passes:
            run.step()


def _close_done(runs: Mapping[int, ScoringRun], pass_number: int) -> None:
    """Take the hooks off of scores for which this was the last pass."""
    if pass_number in runs:
        runs[pass_number].close()


def _results_of(runs: Mapping[int, ScoringRun]) -> Results:
    results = Results()
    for run in runs.values():
        results.update(run.results())
    return results


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


def _counts(results: Results, num_passes: Mapping[ScoreRequest, int]) -> dict[str, int]:
    """Return tokens and samples of the data, each counted once; nothing where no score saw them twice."""
    if max(num_passes.values()) == 1:
        return {}
    passes = {f"{request.target}/{request.method}": number for request, number in num_passes.items()}
    counts: dict[str, int] = {}
    for key, state in results.states.items():
        for name in ("num_tokens", "num_samples"):
            if name in state:
                counts[name] = max(counts.get(name, 0), int(state[name]) // passes[key.split("/", 1)[1]])
    return counts
