"""Plan of a run: what it would measure, keep and send, known before data is read and weights are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from megascore.job.resolved import ModelForm
from megascore.mcore.pipeline.layers import layers_of
from megascore.parallel.axes import describe
from megascore.parallel.merge import Plan, union_of_plans
from megascore.scores.score_file import split_key
from megascore.sites.inventory import grouped
from megascore.sites.places import ModelView
from megascore.sites.requests import ScoreRequest
from megascore.sites.site import Presence, Site, build_sites, requests_present_in
from megascore.sites.targets import TARGETS

__all__ = [
    "DryRun",
    "OneLayer",
    "RankGroup",
    "RankPlan",
    "SiteLine",
    "group_ranks",
    "plan_of_one_layer",
    "plan_of_rank",
    "samples_of_rank",
    "samples_of_step",
]

FLOAT64_BYTES = 8
"""Of each number in what ranks send each other."""


@dataclass(frozen=True, order=True)
class SiteLine:
    """One site as one rank sees it."""

    key: str
    num_channels: int
    roles: str
    num_local_channels: int
    kept_bytes: int
    """Kept by the hook on this rank: its accumulators, and what it has made of its weights."""
    waiting_bytes: int
    """Kept beside that until a step ends."""
    step_bytes: int
    """Given to the all-reduces of a step, beside the 8 bytes that tell all ranks whether all is finite."""
    sample_bytes: int
    """The same for a step of one sample on a rank."""
    finish_bytes: int
    """Given to the two all-reduces at the end, by every rank."""


@dataclass(frozen=True)
class OneLayer:
    """What a rank has at a time in a run that goes through the model layer by layer."""

    weight_bytes: int
    """Of the largest layer, and of all that lies outside of layers."""
    hidden_bytes_of_sample: int
    """Hidden states of one sample between two layers."""
    num_samples: int | None
    """Samples of the rank, at most; None where only the data tells."""
    whole_because: str | None
    """Why all weights are on the device at first; None where they are not."""
    spools: bool
    """Whether hidden states wait in files, too."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank would do; equal on ranks that have the same part of the model."""

    sites: tuple[SiteLine, ...]
    statistics: Plan
    """In global terms, for the sites of this rank."""
    weight_bytes: Mapping[str, int]
    """By data type."""
    unscored: Mapping[str, str]
    """Kind of each place that no score is taken at, by name."""
    unknown: tuple[str, ...]
    """Modules that are not known."""
    one_layer: OneLayer | None = None
    """Of a run that goes through the model layer by layer."""

    @property
    def kept_bytes(self) -> int:
        """Memory of all hooks."""
        return sum(line.kept_bytes for line in self.sites)

    @property
    def waiting_bytes(self) -> int:
        """Memory of all hooks for what waits for the end of a step."""
        return sum(line.waiting_bytes for line in self.sites)

    @property
    def step_bytes(self) -> int:
        """Sent by a step."""
        return sum(line.step_bytes for line in self.sites)

    @property
    def sample_bytes(self) -> int:
        """Sent by a step of one sample."""
        return sum(line.sample_bytes for line in self.sites)


@dataclass(frozen=True)
class RankGroup:
    """Ranks that have the same plan."""

    ranks: tuple[int, ...]
    plan: RankPlan


@dataclass(frozen=True)
class DryRun:
    """A run as it is planned on all ranks."""

    groups: tuple[RankGroup, ...]
    layout: Mapping[str, Any]
    samples_of_step: int
    """That a rank runs in one step, at most."""
    pretended: bool
    """True where one process has been each rank in turn."""
    problems: Sequence[str] = field(default=())
    """What stands in the way of the run itself."""

    @property
    def num_ranks(self) -> int:
        """Processes of the world."""
        return sum(len(group.ranks) for group in self.groups)

    @cached_property
    def sites(self) -> Mapping[SiteLine, Sequence[int]]:
        """All sites of the world with the ranks that have them."""
        ranks: dict[SiteLine, list[int]] = defaultdict(list)
        for group in self.groups:
            for line in group.plan.sites:
                ranks[line].extend(group.ranks)
        return {line: sorted(numbers) for line, numbers in ranks.items()}

    @property
    def finish_bytes(self) -> int:
        """Sent by every rank at the end: the statistics and scores of all sites of the world, in global terms."""
        return sum({line.key: line.finish_bytes for line in self.sites}.values())

    def check(self, requests: Sequence[ScoreRequest]) -> None:
        """Check what only all ranks together can tell. Not collective.

        Raises:
            LayoutError: ranks disagree about a site.
            ModelError: a target matches nothing on any rank.
        """
        plans = {group.ranks[0]: group.plan.statistics for group in self.groups}
        found = {TARGETS[split_key(key).target].kind for key in union_of_plans(plans)}
        requests_present_in(found, requests, grouped(name for group in self.groups for name in group.plan.unknown))


def samples_of_step(view: ModelView, global_batch_size: int) -> int:
    """Return how many samples a rank runs in a step, at most."""
    return -(-global_batch_size // int(view.layout["data"]))


def samples_of_rank(num_samples: int, global_batch_size: int, data_size: int) -> int:
    """Return how many samples a rank runs in a whole run, at most."""
    num_whole, left = divmod(num_samples, global_batch_size)
    return num_whole * -(-global_batch_size // data_size) + -(-left // data_size)


def plan_of_rank(
    view: ModelView, requests: Sequence[ScoreRequest], num_samples: int, present: Presence = nullcontext
) -> RankPlan:
    """Build the hooks of this rank and say what they need; after `check_places`.

    Collective where building hooks is (see `build_sites`).

    Args:
        view: The model; its weights may have no values.
        requests: What to score.
        num_samples: Samples of a step on this rank.
        present: Has the weights of a module there inside.
    """
    sites = build_sites(view, requests, present)
    scored = {request.kind for request in requests}
    return RankPlan(
        sites=tuple(_line(site, num_samples) for site in sites),
        statistics={site.key: site.statistics for site in sites},
        weight_bytes=_weight_bytes(view),
        unscored={place.name: place.kind.value for place in view.places if place.kind not in scored},
        unknown=tuple(view.unknown),
    )


def plan_of_one_layer(
    view: ModelView, form: ModelForm, num_samples: int | None, whole_because: str | None, *, spools: bool
) -> OneLayer:
    """Return what a rank needs at a time where layers run one at a time; arguments as in `OneLayer`. Not collective."""
    layers = [layer for chunk in view.modules for layer in layers_of(chunk)]
    in_layers = _parameters(layers)
    outside = sum(weight.nbytes for key, weight in _parameters(view.modules).items() if key not in in_layers)
    largest = max((sum(weight.nbytes for weight in layer.parameters()) for layer in layers), default=0)
    length = form.sequence_length // int(view.layout["context"])
    if view.layout["sequence"]:
        length //= int(view.layout["tensor"])
    of_sample = length * int(view.facts["hidden_size"]) * form.dtype.itemsize
    return OneLayer(outside + largest, of_sample, num_samples, whole_because, spools)


def group_ranks(plans: Sequence[RankPlan]) -> tuple[RankGroup, ...]:
    """Group the plans of all ranks, given in rank order, by what is the same."""
    groups: list[tuple[RankPlan, list[int]]] = []
    for rank, plan in enumerate(plans):
        same = next((ranks for other, ranks in groups if other == plan), None)
        if same is None:
            groups.append((plan, [rank]))
        else:
            same.append(rank)
    return tuple(RankGroup(tuple(ranks), plan) for plan, ranks in groups)


def _line(site: Site, num_samples: int) -> SiteLine:
    placement = site.hook.placement
    merged = (*site.statistics, *site.score_statistics * len(site.requests))
    waiting, of_sample = (site.hook.pending_numbers(number) * FLOAT64_BYTES for number in (num_samples, 1))
    # The same numbers go to one all-reduce for each axis.
    num_groups = len(site.hook.settling_groups)
    return SiteLine(
        site.key,
        placement.shard.total,
        describe(placement),
        placement.shard.length,
        kept_bytes=site.kept_bytes(),
        waiting_bytes=waiting,
        step_bytes=waiting * num_groups,
        sample_bytes=of_sample * num_groups,
        finish_bytes=sum(prod(statistic.shape) for statistic in merged) * FLOAT64_BYTES,
    )


def _weight_bytes(view: ModelView) -> dict[str, int]:
    num_bytes: dict[str, int] = defaultdict(int)
    for parameter in _parameters(view.modules).values():
        num_bytes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return dict(num_bytes)


def _parameters(modules: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    """Return the parameters of modules, those that are shared once."""
    return {id(parameter): parameter for module in modules for parameter in module.parameters()}
