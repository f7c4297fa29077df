"""Parts of a model that is scored one part at a time: each block, and what lies outside of all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megascore.parallel.comm import gather_objects
from megascore.runs.scoring_run import ScoringRun
from megascore.sites.places import ModelView, Place
from megascore.sites.requests import ScoreRequest

__all__ = ["ModelParts"]


class ModelParts:
    """Blocks of a model by their numbers, and under the next number what lies outside of them.

    All ranks know what is scored in each part, also those that do not have it.
    """

    def __init__(self, view: ModelView, blocks: Sequence[nn.Module | None], requests: Sequence[ScoreRequest]) -> None:
        """Sort the places. Collective over the world.

        Args:
            view: The whole model.
            blocks: Its blocks, in order; None for one that is on another rank.
            requests: What to score.
        """
        self._view = view
        kinds = {request.kind for request in requests}
        self.modules: list[Sequence[nn.Module]] = [[] if block is None else [block] for block in blocks]
        """Of each part on this rank: the block, or those modules outside of blocks at which something is scored."""
        owner = {
            id(module): number for number, own in enumerate(self.modules) for block in own for module in block.modules()
        }
        self._places: list[list[Place]] = [[] for _ in (*blocks, None)]
        for place in view.places:
            if place.kind in kinds:
                self._places[owner.get(id(place.module), len(blocks))].append(place)
        self.modules.append(list({id(place.module): place.module for place in self._places[-1]}.values()))
        found = gather_objects([{place.kind for place in places} for places in self._places])
        everywhere = [set[object]().union(*ranks) for ranks in zip(*found, strict=True)]
        self.requests = [tuple(r for r in requests if r.kind in kinds) for kinds in everywhere]
        """What is scored in each part."""

    def scoring(self, number: int, requests: Sequence[ScoreRequest] | None = None) -> ScoringRun | None:
        """Put hooks on a part, whose weights are present. Collective over the world.

        Args:
            number: Of the part.
            requests: Those of its scores that are meant; None: all.

        Returns:
            A run, also on ranks that do not have the part; None where nothing is scored in it.
        """
        wanted = self.requests[number] if requests is None else requests
        view = _PartView(self._view, self.modules[number], self._places[number])
        return ScoringRun(view, wanted) if wanted else None


@dataclass(frozen=True)
class _PartView:
    """A view of a model that shows only some of its places."""

    whole: ModelView
    modules: Sequence[nn.Module]
    places: Sequence[Place]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.whole.facts

    @property
    def unknown(self) -> Sequence[str]:
        # What is unknown in the model is told of the whole.
        return ()

    @property
    def layout(self) -> Mapping[str, Any]:
        return self.whole.layout
