"""Sites: one score at one place. Built from a model view and the scores asked for, and checked before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.hooks import ForwardHook, Merge, State, Statistic
from megascore.parallel.comm import agree, gather_objects, world_rank, world_size
from megascore.parallel.forms import placed
from megascore.parallel.merge import Part, Plan, agree_on_plan
from megascore.parallel.placed import PlacedHook
from megascore.sites.heads import width_of_head
from megascore.sites.inventory import grouped
from megascore.sites.places import ModelView, Place, check_covers_world
from megascore.sites.requests import ScoreRequest
from megascore.sites.targets import PlaceKind

__all__ = [
    "SCORE",
    "Presence",
    "Present",
    "Site",
    "build_sites",
    "check_places",
    "groups_of",
    "hook_at",
    "plan_of_scores",
    "plan_of_states",
    "present_requests",
    "requests_present_in",
]

SCORE = "score"
"""Name of the one result of a site that goes into the score file."""


Presence = Callable[[nn.Module], AbstractContextManager[Any]]
"""Has the weights of a module on its device inside."""


class Present(NamedTuple):
    """What a model has of what was asked for, and what nothing is known to score."""

    requests: tuple[ScoreRequest, ...]
    """Those that the model has modules for."""
    not_scored: Mapping[str, str]
    """Global names of modules with channels, heads, features or experts that no score is of, with what they are; the
    same on all ranks."""


@dataclass(frozen=True)
class Site:
    """One score at one place of this rank."""

    place: Place
    request: ScoreRequest
    hook: PlacedHook
    unit_size: int
    """Channels that are ranked as one: the head size where heads are ranked, else 1."""

    @property
    def key(self) -> str:
        """Name in the score file: ``{place}/{target}/{method}``."""
        return f"{self.place.name}/{self.request.target}/{self.request.method}"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The hook's statistics in global terms."""
        return self.hook.statistics(self.place.placement.shard.total)

    @property
    def score_statistic(self) -> Statistic:
        """The finished score as something to merge: every rank that shares the place computes the same."""
        num_units = self.place.placement.shard.total // self.unit_size
        groups = self.place.num_competing_groups if self.request.ranked.groups is not None else None
        return Statistic(SCORE, (num_units,), merge=Merge.REPLICATED, groups=groups)

    def part(self) -> Part:
        """Return this rank's accumulators, to be merged."""
        return Part(self.place.placement, self.statistics, self.hook.state)

    def differences_from(self, saved: State) -> list[str]:
        """Name every reason why a merged state can't be this site's."""
        found = self.hook.differences_from(saved, self.place.placement.shard.total)
        return [f"{self.key}: {difference}" for difference in found]

    def restore(self, merged: State) -> None:
        """Take this rank's part of a merged state: the parts of all ranks add up to it again."""
        placement = self.place.placement
        self.hook.restore({s.name: placement.local_part(s, merged[s.name]) for s in self.statistics})

    def score(self, merged: State) -> Tensor:
        """Return the finished score [units] float64 from merged statistics: norm2 over the channels of each unit."""
        channels = self.hook.compute(merged)[SCORE].double()
        return channels if self.unit_size == 1 else channels.view(-1, self.unit_size).norm(dim=1)


def check_places(view: ModelView, requests: Sequence[ScoreRequest]) -> None:
    """Refuse a layout that can't be scored, before any hook is built. Not collective.

    Raises:
        LayoutError: a place leaves out a parallel axis, or its channels do not divide into heads.
        ModelError: two places are one module.
    """
    _refuse_shared_modules(view)
    # What a rank can't tell of its modules must fail here, where all ranks hear of it.
    _ = view.unknown
    for request, place in _wanted(view, requests):
        check_covers_world(place, world_size())
        _unit_size(request, place)


def _refuse_shared_modules(view: ModelView) -> None:
    names: dict[tuple[PlaceKind, int], str] = {}
    for place in view.places:
        # Where experts run as one grouped layer, each is a part of it, and its place reads that part.
        if place.kind is PlaceKind.ROUTED_EXPERT_PROJECTION:
            continue
        first = names.setdefault((place.kind, id(place.module)), place.name)
        if first != place.name:
            raise ModelError(
                f"{first} and {place.name} are one module: what runs through the one cannot be told from the other. "
                "Give each its own copy (copy.deepcopy) while the model is scored."
            )


def build_sites(view: ModelView, requests: Sequence[ScoreRequest], present: Presence = nullcontext) -> tuple[Site, ...]:
    """Return this rank's sites, their accumulators allocated: a rank that sees no data contributes zeros.

    Collective over the ranks that hold parts of one weight, where a hook needs all of it: KV heads that are spread over
    tensor-parallel ranks, and weights sharded by FSDP.

    Args:
        view: The model.
        requests: What to score.
        present: Has the weights of a module there inside; by default they are there all the time.
    """
    sites = []
    for request, place in _wanted(view, requests):
        with present(place.module):
            hook = hook_at(place, request)
        sites.append(Site(place, request, hook, _unit_size(request, place)))
    return tuple(sites)


def hook_at(place: Place, request: ScoreRequest) -> PlacedHook:
    """Return a fresh hook for one score at a place. Collective where `Place.scored_module` is.

    Raises:
        ModelError: the model never calls the module there, or gives it what can't be told from tokens.
    """
    if place.obstacle is not None:
        raise ModelError(f"{place.name}: {place.obstacle.format(target=request.target)}")
    module = place.module if place.scored_module is None else place.scored_module()
    hook_class = request.definition.hook
    assert issubclass(hook_class, ForwardHook)
    hook = placed(hook_class).at(module, place.placement.shard.length, dict(request.options))
    hook.put(place.placement, place.groups, place.device)
    return hook


def present_requests(view: ModelView, requests: Sequence[ScoreRequest]) -> Present:
    """Return the requests without those that may be left out, and are for nothing that the model has.

    Collective over the world. Rank 0 warns of what the model has, but the view does not know.

    Raises:
        ModelError: on every rank, where no rank has a place for another one, or any place at all.
    """
    gathered = gather_objects(({place.kind for place in view.places}, tuple(view.unknown)))
    found = {kind for kinds, _ in gathered for kind in kinds}
    lines = list(dict.fromkeys(name for _, names in gathered for name in names))
    unknown = grouped(lines)
    present = requests_present_in(found, requests, unknown)
    if unknown:
        # Gathered, so the same on all ranks. A warning can be an error.
        agree("telling what is unknown", lambda: _warn_of_unknown(unknown))
    return Present(present, dict(line.split(": ", 1) for line in lines))


def _warn_of_unknown(unknown: Sequence[str]) -> None:
    if world_rank() == 0:
        names = "; ".join(unknown)
        warnings.warn(
            f"megascore does not know these modules, and scores nothing in them: {names}.",
            # The caller of `attach`.
            stacklevel=7,
        )


def requests_present_in(
    found: Collection[PlaceKind], requests: Sequence[ScoreRequest], unknown: Sequence[str] = ()
) -> tuple[ScoreRequest, ...]:
    """Return the requests that are for one of the kinds of places in a model, and complain of others that must be.

    Not collective.

    Args:
        found: The kinds.
        requests: What to score.
        unknown: What else the model has, for errors.

    Raises:
        ModelError: a request is for none of them, and may not be left out; or there are none at all.
    """
    present, has = [], f" It has, of kinds that are not known: {'; '.join(unknown)}." if unknown else ""
    for request in requests:
        if request.kind in found:
            present.append(request)
        elif not request.where_present:
            raise ModelError(
                f"target '{request.target}' matches no module on any rank: the model has no "
                f"{request.kind.value} that megascore knows.{has} Drop it from 'scores'."
            )
    if not present:
        raise ModelError(f"the model has no module that megascore knows for any of the scores.{has}")
    return tuple(present)


def plan_of_states(sites: Sequence[Site]) -> Plan:
    """Return the statistics of all sites in the world.

    Collective over the world.

    Raises:
        LayoutError: ranks disagree about a site.
    """
    return agree_on_plan({site.key: site.statistics for site in sites})


def plan_of_scores(sites: Sequence[Site]) -> Plan:
    """Return the finished scores of all sites in the world. Collective over the world."""
    return agree_on_plan({site.key: (site.score_statistic,) for site in sites})


def groups_of(scores: Plan) -> dict[str, int]:
    """Return in how many groups the units of sites compete, given the plan of their scores; not where all do."""
    return {key: statistic.groups for key, (statistic,) in scores.items() if statistic.groups is not None}


def _wanted(view: ModelView, requests: Sequence[ScoreRequest]) -> Iterator[tuple[ScoreRequest, Place]]:
    for request in requests:
        for place in view.places:
            if place.kind is request.kind:
                yield request, place


def _unit_size(request: ScoreRequest, place: Place) -> int:
    """Return how many channels are ranked as one: those of a head, which the place knows."""
    if not request.ranked.heads:
        return 1
    assert place.num_heads is not None
    return width_of_head(place.name, place.placement.shard.total, place.num_heads)
