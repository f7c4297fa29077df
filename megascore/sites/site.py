"""Sites: one score at one place. Built from a model view and the scores asked for, and checked before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.hooks import ForwardHook, Merge, State, Statistic
from megascore.hooks.sharing import together
from megascore.hooks.statistics import differences
from megascore.parallel.comm import agree, gather_objects, world_rank, world_size
from megascore.parallel.forms import placed
from megascore.parallel.merge import Part, Plan, agree_on_plan
from megascore.parallel.placed import PlacedHook
from megascore.sites.heads import width_of_head
from megascore.sites.inventory import grouped
from megascore.sites.places import ModelView, Place, check_covers_world
from megascore.sites.replicates import replicates, unit_scores
from megascore.sites.requests import ScoreRequest
from megascore.sites.step_groups import NUM_GROUPS, StepGroups, statistics_of_groups, without_groups
from megascore.sites.targets import PlaceKind

__all__ = [
    "REPLICATES",
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
"""Name of the result of a site that goes into the score file."""
REPLICATES = "replicates"
"""Name of the scores without each of the groups of steps in turn, from which its uncertainty follows."""
MOMENTS = "moments"
"""Stands in a site's key for the methods that share a hook."""


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
    """One hook at one place of this rank, and the scores that are computed from what it adds up."""

    place: Place
    requests: tuple[ScoreRequest, ...]
    """All of one target."""
    hook: PlacedHook
    unit_size: int
    """Channels that are ranked as one: the head size where heads are ranked, else 1."""
    groups: StepGroups | None
    """The same by groups of steps; None of a score whose statistics can't be told apart by steps."""

    @property
    def target(self) -> str:
        """What is ranked."""
        return self.requests[0].target

    @property
    def key(self) -> str:
        """Name of the statistics: ``{place}/{target}/{method}``, or ``moments`` for the method of several."""
        method = self.requests[0].method if len(self.requests) == 1 else MOMENTS
        return f"{self.place.name}/{self.target}/{method}"

    @property
    def score_keys(self) -> dict[str, ScoreRequest]:
        """Names in the score file: ``{place}/{target}/{method}``."""
        return {f"{self.place.name}/{self.target}/{request.method}": request for request in self.requests}

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The hook's statistics in global terms, and those of the groups."""
        own = self.hook.statistics(self.hook.total_channels)
        return own if self.groups is None else (*own, *statistics_of_groups(own))

    @property
    def score_statistics(self) -> tuple[Statistic, ...]:
        """A finished score as something to merge: every rank that shares the place computes the same."""
        num_units = self.hook.total_channels // self.unit_size
        groups = self.place.num_competing_groups if self.requests[0].ranked.groups is not None else None
        score = Statistic(SCORE, (num_units,), merge=Merge.REPLICATED, groups=groups)
        if self.groups is None:
            return (score,)
        return (score, Statistic(REPLICATES, (NUM_GROUPS, num_units), merge=Merge.REPLICATED))

    def part(self) -> Part:
        """Return this rank's accumulators, to be merged."""
        of_groups = {} if self.groups is None else self.groups.state
        return Part(self.hook.placement, self.statistics, {**self.hook.state, **of_groups})

    def differences_from(self, saved: State) -> list[str]:
        """Name every reason why a merged state can't be this site's."""
        found = differences(self.statistics, saved)
        found = found or self.hook.differences_from(without_groups(saved), self.hook.total_channels)
        return [f"{self.key}: {difference}" for difference in found]

    def restore(self, merged: State) -> None:
        """Take this rank's part of a merged state: the parts of all ranks add up to it again."""
        local = {s.name: self.hook.placement.local_part(s, merged[s.name]) for s in self.statistics}
        self.hook.restore(without_groups(local))
        if self.groups is not None:
            self.groups.restore(self.hook.state, local)

    def scores(self, merged: State) -> dict[str, dict[str, Tensor]]:
        """Return, by the names in the score file, finished scores [units] and replicates [groups, units], float64."""
        found = {}
        for key, request in self.score_keys.items():
            method: Any = self.hook if len(self.requests) == 1 else request.definition.hook
            score = partial(unit_scores, method, unit_size=self.unit_size)
            found[key] = {SCORE: score(without_groups(merged))}
            if self.groups is not None:
                found[key][REPLICATES] = replicates(merged, score, method.grows_with)
        return found

    def kept_bytes(self) -> int:
        """Return how much memory the hook takes on this rank."""
        kept = (*self.hook.kept(), *(() if self.groups is None else self.groups.kept()))
        return sum({id(tensor): tensor.nbytes for tensor in kept}.values())


def check_places(view: ModelView, requests: Sequence[ScoreRequest]) -> None:
    """Refuse a layout that can't be scored, before any hook is built. Not collective.

    Raises:
        LayoutError: a place leaves out a parallel axis, or its channels do not divide into heads.
        ModelError: two places are one module.
    """
    _refuse_shared_modules(view)
    # What a rank can't tell of its modules must fail here, where all ranks hear of it.
    _ = view.unknown
    for (request, *_), place in _wanted(view, [(request,) for request in requests]):
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
    for request, place in _wanted(view, _sharing_hooks(requests)):
        with present(place.module):
            hook = hook_at(place, request)
        has_groups = hook.additive and not hook.is_large
        groups = StepGroups(hook.statistics(hook.placement.shard.length), hook.state) if has_groups else None
        unit_size = 1 if hook.units_are_heads else _unit_size(request[0], place)
        sites.append(Site(place, request, hook, unit_size, groups))
    return tuple(sites)


def _sharing_hooks(requests: Sequence[ScoreRequest]) -> list[tuple[ScoreRequest, ...]]:
    """Return requests in tuples, each for one hook, in the order of the first of each."""
    found: dict[object, list[ScoreRequest]] = {}
    for number, request in enumerate(requests):
        root = getattr(request.definition.hook, "shared", None)
        found.setdefault(number if root is None else (request.target, root), []).append(request)
    return [tuple(own) for own in found.values()]


def hook_at(place: Place, requests: Sequence[ScoreRequest]) -> PlacedHook:
    """Return a fresh hook at a place. Collective where `Place.scored_module` is.

    Args:
        place: The place.
        requests: The scores that the hook serves; several only of hooks that keep moments.

    Raises:
        ModelError: the model never calls the module there, or gives it what can't be told from tokens.
    """
    first = requests[0]
    if place.obstacle is not None:
        raise ModelError(f"{place.name}: {place.obstacle.format(target=first.target)}")
    module = place.module if place.scored_module is None else place.scored_module()
    classes = [request.definition.hook for request in requests]
    hook_class = classes[0] if len(classes) == 1 else together(frozenset(classes))
    assert issubclass(hook_class, ForwardHook)
    placement = place.placement
    if hook_class.units_are_heads:
        placement = placement.by_units(_unit_size(first, place))
    hook = placed(hook_class).at(module, placement.shard.length, dict(first.options))
    hook.place_name, hook.num_features = place.name, place.num_features
    hook.put(placement, place.groups, place.device)
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
    return agree_on_plan({key: site.score_statistics for site in sites for key in site.score_keys})


def groups_of(scores: Plan) -> dict[str, int]:
    """Return in how many groups the units of sites compete, given the plan of their scores; not where all do."""
    return {key: score.groups for key, (score, *_) in scores.items() if score.groups is not None}


def _wanted(
    view: ModelView, requests: Sequence[tuple[ScoreRequest, ...]]
) -> Iterator[tuple[tuple[ScoreRequest, ...], Place]]:
    for sharing in requests:
        for place in view.places:
            if place.kind is sharing[0].kind:
                yield sharing, place


def _unit_size(request: ScoreRequest, place: Place) -> int:
    """Return how many channels are ranked as one: those of a head, which the place knows."""
    if not request.ranked.heads:
        return 1
    assert place.num_heads is not None
    return width_of_head(place.name, place.placement.shard.total, place.num_heads)
