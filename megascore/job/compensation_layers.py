"""The way of calibration data through the smaller model, layer by layer, with projections fitted on the way.

The smaller model is the parent under masks, with its own hidden states and the new weights of the projections that are
done. All ranks go through all layers together, whoever has them, and meet before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megascore.capture.stores import TensorStore
from megascore.compensation.catching import caught_inputs, followed_mask, local_mask, swapped_weights
from megascore.compensation.projections import Projection
from megascore.compensation.refit import Refit, Solved
from megascore.compensation.work_folder import WorkFolder
from megascore.data import MicroBatches
from megascore.errors import DataError
from megascore.job.inputs import JobInputs
from megascore.job.layer_weights import layer_present
from megascore.masks.masked import masked_view
from megascore.mcore.pipeline.chunk import ChunkRunner
from megascore.mcore.pipeline.layers import LayerOrder
from megascore.mcore.sites.view import MegatronModelView
from megascore.parallel.comm import agree, gather_objects, max_over_world, world_rank
from megascore.plans.units import Units
from megascore.runs.progress import ScoringProgress
from megascore.runs.steps import run_steps
from megascore.scores.assemble import layer_of
from megascore.sites.places import Place
from megascore.sites.targets import PlaceKind

__all__ = ["LayerRefits", "Method"]

Change: TypeAlias = tuple[Tensor, Tensor]
"""A tensor of the model, and the values that the smaller one has."""

STAGES = ((PlaceKind.ATTENTION_PROJECTION,), (PlaceKind.FFN_PROJECTION, PlaceKind.ROUTED_EXPERT_PROJECTION))
"""What is fitted together, in the order in which a layer runs it: the inputs of the second depend on the first."""


@dataclass(frozen=True)
class Method:
    """How projections are fitted."""

    name: str
    """``least_squares`` or ``bias``."""
    ridge: float

    def solve(self, refit: Refit) -> Solved | None:
        """Collective over the ranks that share the place."""
        return refit.solve_bias() if self.name == "bias" else refit.solve_least_squares(self.ridge)


class LayerRefits:
    """One pass through all layers."""

    def __init__(
        self,
        inputs: JobInputs,
        view: MegatronModelView,
        order: LayerOrder,
        units: Units,
        method: Method,
        projections: Callable[[Sequence[Place]], list[Projection]],
        folder: WorkFolder,
        make_store: Callable[[], TensorStore],
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            inputs: Samples and weights.
            view: The parent on this rank; its layers may have no weights yet.
            order: Its layers.
            units: What stays.
            method: How projections are fitted.
            projections: Returns those of a layer's places.
            folder: Where new weights go, and come from where a layer is done.
            make_store: Returns where hidden states wait between two layers.
        """
        self._inputs, self._view, self._order, self._units = inputs, view, order, units
        self._method, self._projections, self._folder = method, projections, folder
        self._num_heads = int(view.facts["num_attention_heads"])
        of_rank = list[slice]()
        self._indices: list[list[int]] = []
        for step in range(inputs.total_steps):
            slices = inputs.share.micro_batches(step, inputs.samples.num_samples)
            self._indices.append(list(range(len(of_rank), len(of_rank) + len(slices))))
            of_rank.extend(slices)
        micro_batches = MicroBatches(inputs.samples, of_rank)
        self._store = make_store()
        self._runners = {
            number: ChunkRunner(chunk, micro_batches, self._store, inputs.form.device, loss=False)
            for number, chunk in order.own.items()
        }

    def close(self) -> None:
        """Drop everything that waits."""
        self._store.close()

    def run(self, num_done: int, save: Callable[[int, list[dict[str, Any]]], None], progress: ScoringProgress) -> None:
        """Go through all layers; those that are done take their weights from the folder. Collective over the world.

        Args:
            num_done: Layers that an earlier run has fitted.
            save: Is called on rank 0 when a layer is done, with its number and what is known of its projections.
            progress: Counts layers.
        """
        for layer in range(self._order.num_layers):
            self._enter_chunk_of(layer)
            with ExitStack() as stack:
                agree(f"reading the weights of layer {layer}", lambda: self._bring(layer, stack))  # noqa: B023
                facts = self._run_layer(layer, is_done=layer < num_done)
            if layer >= num_done:
                gathered = [fact for of_rank in gather_objects(facts) for fact in of_rank]
                agree(f"saving layer {layer}", lambda: save(layer, gathered) if world_rank() == 0 else None)  # noqa: B023
            progress.advance()
        for runner in self._runners.values():
            runner.close()

    def _run_layer(self, layer: int, *, is_done: bool) -> list[dict[str, Any]]:
        """Fit a layer, and let the smaller model run it. Returns what this rank tells of its projections."""
        chunk, position = self._order.place_of(layer)
        is_here = chunk in self._runners
        prefix = f"decoder.layers.{layer}"
        places = [p for p in self._view.places if p.name == prefix or p.name.startswith(f"{prefix}.")]
        is_kept = layer in self._units.of_layers and layer in self._units.layers
        found = self._projections(places) if is_kept and is_here else []
        new: list[Change] = []
        facts: list[dict[str, Any]] = []
        written: dict[str, Tensor] = {}
        if is_done:
            read = agree(f"reading what layer {layer} takes over", lambda: [self._saved(p) for p in found])
            new = [change for changes in read for change in changes]
        else:
            # Whether any rank has something to fit here: the others meet it before each step.
            for kinds in STAGES if max_over_world([int(bool(found))])[0] else ():
                part = [projection for projection in found if projection.place.kind in kinds]
                new += self._fit(layer, position if is_here else None, places, part, new, kinds, facts, written)
            agree(f"writing layer {layer}", lambda: self._folder.write(layer, world_rank(), written))

        def run(index: int) -> None:
            # A layer that goes leaves the hidden states as they are.
            if is_here and is_kept:
                # In this order: the masks of grouped experts are zeros in their weights.
                with swapped_weights(new), self._masks(places):
                    self._runners[chunk].run_layer(position, index, None)

        self._go_over(run)
        return facts

    def _fit(
        self,
        layer: int,
        position: int | None,
        places: Sequence[Place],
        projections: Sequence[Projection],
        done: Sequence[Change],
        kinds: Sequence[PlaceKind],
        facts: list[dict[str, Any]],
        written: dict[str, Tensor],
    ) -> list[Change]:
        """Fit some projections of a layer, add what is known of them and what this rank writes.

        ``position`` is None on ranks that have none of it. Returns new weights, as `_take_over` does.
        """
        chunk, _ = self._order.place_of(layer)
        refits = [Refit(projection.place, projection.kept) for projection in projections]
        own = [projection.place for projection in projections]
        # What feeds these projections, but not their own masks: the inputs are wanted as the smaller model has them.
        around = [p for p in places if p.kind not in kinds and p.kind is not PlaceKind.LAYER]
        if PlaceKind.ATTENTION_PROJECTION in kinds:
            around = [p for p in around if p.kind is PlaceKind.NORM]

        def look(index: int) -> None:
            if position is None:
                return
            mask = self._runners[chunk].mask_of(index)
            # Once: what sends it along with tokens knows it by its identity.
            mask = None if mask is None else mask.to(self._inputs.form.device)
            with (
                swapped_weights(done),
                self._masks(around),
                followed_mask([place for place in places if place.kind in kinds], mask),
                caught_inputs(own) as caught,
            ):
                self._runners[chunk].look_at_layer(position, index)
                masks = {
                    place.name: local_mask(place, mask, caught[place.name]) for place in own if place.name in caught
                }
            for place, refit in zip(own, refits, strict=True):
                if place.name in caught:
                    refit.add(caught[place.name], masks[place.name])

        if max_over_world([int(bool(projections))])[0]:
            self._go_over(look)
        solved = agree(f"fitting layer {layer}", lambda: self._solved(projections, refits))
        return self._take_over(projections, refits, solved, facts, written)

    def _solved(self, projections: Sequence[Projection], refits: Sequence[Refit]) -> list[Solved | None]:
        solved = [self._method.solve(refit) for refit in refits]
        for projection, found in zip(projections, solved, strict=True):
            if found is None and not projection.is_of_expert:
                raise DataError(f"no token that counts reached {projection.place.name}: give more text.")
        return solved

    def _take_over(
        self,
        projections: Sequence[Projection],
        refits: Sequence[Refit],
        solved: Sequence[Solved | None],
        facts: list[dict[str, Any]],
        written: dict[str, Tensor],
    ) -> list[Change]:
        """Return new weights as this rank needs them, [E, this rank's channels], and add those that it writes."""
        new = []
        rows = torch.tensor(self._units.hidden_size)
        for projection, refit, found in zip(projections, refits, solved, strict=True):
            fact: dict[str, Any] = {"tensor": projection.name, "tokens": 0, "error_left": 1.0}
            if found is not None:
                fact.update(tokens=found.num_tokens, error_left=found.error_left)
                weight = refit.weight.clone()
                weight[:, refit.own_kept.to(weight.device)] = found.own_columns.to(weight.dtype)
                new.append((refit.weight, weight))
                kind, kept = _kind_of(weight), rows.to(weight.device)
                if refit.is_first:
                    written[projection.name] = found.weight[kept].to(kind)
                if found.bias is not None:
                    bias = _bias_of(projection)
                    new.append((bias, (bias.double() + found.bias).to(bias.dtype)))
                    if refit.is_first:
                        written[projection.bias_name] = (bias.double() + found.bias)[kept].to(kind)
            if refit.is_first:
                facts.append(fact)
        return new

    def _saved(self, projection: Projection) -> list[Change]:
        """Return the new values of a layer that is done, as this rank needs them; none where it keeps the old ones."""
        layer = layer_of(projection.place.name)
        found, bias = (self._folder.read(name, layer) for name in (projection.name, projection.bias_name))
        changes: list[Change] = []
        refit = Refit(projection.place, projection.kept)
        rows = torch.tensor(self._units.hidden_size, device=refit.weight.device)
        if found is not None:
            weight = refit.weight.clone()
            own = refit.own_kept.to(weight.device)
            weight[rows[:, None], own] = found[:, refit.positions].to(weight.device, weight.dtype)
            changes.append((refit.weight, weight))
        if bias is not None:
            old = _bias_of(projection)
            new = old.clone()
            new[rows] = bias.to(old.device, old.dtype)
            changes.append((old, new))
        return changes

    def _masks(self, places: Sequence[Place]) -> Any:
        return masked_view(self._view, self._units, self._num_heads, places)

    def _enter_chunk_of(self, layer: int) -> None:
        """At the first layer of a chunk: hand hidden states on from the chunk before."""
        chunk, position = self._order.place_of(layer)
        if position > 0:
            return
        before, own = self._runners.get(chunk - 1), self._runners.get(chunk)
        with _collecting(own) as get_input:

            def hand_on(index: int) -> None:
                if before is not None:
                    before.send(index)
                if get_input is not None:
                    get_input(index)

            self._go_over(hand_on)
        if before is not None:
            before.close()

    def _bring(self, layer: int, stack: ExitStack) -> None:
        module: nn.Module | None = self._order.own_layer(layer)
        if module is not None:
            chunk = self._order.own[self._order.place_of(layer)[0]]
            stack.enter_context(layer_present(self._inputs.source, chunk, module, self._inputs.form.device))

    def _go_over(self, work: Callable[[int], object]) -> None:
        """Do ``work`` with each of this rank's micro-batches, step by step, as all other ranks do with theirs."""

        def run_step(step: int) -> None:
            for index in self._indices[step]:
                work(index)

        run_steps(range(self._inputs.total_steps), run_step, before=lambda _: max_over_world([0]))


@contextmanager
def _collecting(runner: ChunkRunner | None) -> Iterator[Callable[[int], None] | None]:
    if runner is None:
        yield None
    else:
        with runner.collecting() as get_input:
            yield get_input


def _bias_of(projection: Projection) -> Tensor:
    module: Any = projection.place.module
    assert isinstance(module.bias, Tensor), f"{projection.place.name} has no bias, and was asked for one"
    return module.bias.detach()


def _kind_of(weight: Tensor) -> torch.dtype:
    """Return the type in which new weights wait: the parent's file has its own, to which they are rounded once."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
