"""What is scored in each layer of a Megatron model, and outside of its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megascore.blockwise.block_views import PartView, places_by_block
from megascore.mcore.pipeline.layers import LayerOrder
from megascore.mcore.sites.view import MegatronModelView
from megascore.parallel.comm import gather_objects
from megascore.runs.scoring_run import ScoringRun
from megascore.sites.places import Place
from megascore.sites.requests import ScoreRequest

__all__ = ["ModelParts"]


class ModelParts:
    """Gives a scoring run for each part of the model: the same scores on all ranks, also those without the part."""

    def __init__(self, view: MegatronModelView, order: LayerOrder, requests: Sequence[ScoreRequest]) -> None:
        """Sort the places. Collective over the world.

        Args:
            view: The whole model.
            order: Its layers.
            requests: What to score.
        """
        self._view = view
        self._order = order
        kinds = {request.kind for request in requests}
        wanted = [place for place in view.places if place.kind in kinds]
        own = [order.own_layer(layer) for layer in range(order.num_layers)]
        inside, self._outside = places_by_block(wanted, [layer or nn.Identity() for layer in own])
        self._inside = [tuple(places) for places in inside]
        found = gather_objects([{place.kind for place in places} for places in (*self._inside, self._outside)])
        everywhere = [set[object]().union(*ranks) for ranks in zip(*found, strict=True)]
        by_part = [tuple(r for r in requests if r.kind in kinds) for kinds in everywhere]
        self._requests, self.requests_outside = by_part[:-1], by_part[-1]

    def scoring_layer(self, layer: int) -> ScoringRun | None:
        """Put hooks on a layer, whose weights are present. Collective over the world; None where nothing is scored."""
        module = self._order.own_layer(layer)
        return self._scoring([] if module is None else [module], self._inside[layer], self._requests[layer])

    def scoring_outside(self) -> ScoringRun | None:
        """Put hooks on what follows the layers. Collective over the world; None where nothing is scored there."""
        modules = list({id(place.module): place.module for place in self._outside}.values())
        return self._scoring(modules, self._outside, self.requests_outside)

    def _scoring(
        self, modules: Sequence[nn.Module], places: Sequence[Place], requests: Sequence[ScoreRequest]
    ) -> ScoringRun | None:
        return ScoringRun(PartView(self._view, modules, places), requests) if requests else None
