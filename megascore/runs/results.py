"""Results of a run, and the one way from them to a score file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megascore.errors import HookStateError
from megascore.parallel.comm import world_rank
from megascore.scores.assemble import Found, assemble_scores
from megascore.scores.score_file import Scores, split_key
from megascore.sites.places import ModelView
from megascore.sites.requests import ScoreRequest
from megascore.sites.targets import TARGETS

__all__ = ["Results", "conclude"]


@dataclass(frozen=True)
class Results:
    """Merged results of sites, by their keys: the same on every rank."""

    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Statistics, with those of groups of steps, on the CPU; by the keys of sites."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Finished scores [units] float64, on the CPU; zeros where no token was seen. By the keys of the score file."""
    groups: dict[str, int] = field(default_factory=dict)
    """In how many groups the units of a site compete; sites of which all units compete are left out."""
    replicates: dict[str, Tensor] = field(default_factory=dict)
    """Scores without each group of steps in turn, [groups, units] float64, on the CPU; zeros where a group saw none."""
    num_passes: dict[str, int] = field(default_factory=dict)
    """How often a site has seen all data; once where nothing is said."""

    def update(self, others: Results, num_passes: int = 1) -> None:
        """Add the results of other sites, for which the run went over all data ``num_passes`` times."""
        self.states.update(others.states)
        self.scores.update(others.scores)
        self.groups.update(others.groups)
        self.replicates.update(others.replicates)
        self.num_passes.update({key: num_passes * others.num_passes.get(key, 1) for key in others.states})

    def counts(self, name: str) -> dict[str, int]:
        """Return how many tokens (``num_tokens``) or samples (``num_samples``) each site has seen in one pass.

        Sites that count no samples are left out of those, and sites behind a router of both: what they see differs.
        """
        return {
            key: int(state[name]) // self.num_passes.get(key, 1)
            for key, state in self.states.items()
            if name in state and not TARGETS[split_key(key).target].routed
        }


def conclude(
    results: Results,
    view: ModelView,
    requests: Sequence[ScoreRequest],
    num_steps: int,
    metadata: Mapping[str, Any],
    not_scored: Mapping[str, str],
    blockwise: Mapping[str, Any] | None = None,
    *,
    keep_statistics: bool = True,
) -> Scores:
    """Return the content of the score file of a run, however it went over the data. Not collective.

    Args:
        results: Of the whole run.
        view: The model.
        requests: What was scored.
        num_steps: Steps of one pass over the data.
        metadata: Entries to add, such as fingerprints.
        not_scored: What of the model no score is of, and what it is.
        blockwise: How blocks were run one at a time; None for a full pass.
        keep_statistics: Whether the file has the statistics, too.

    Raises:
        HookStateError: no tokens have been seen.
        LayoutError: the layers on the ranks do not make up a whole model.
    """
    _require_data(results)
    if world_rank() == 0:
        _warn_of_uneven_data(results.counts("num_tokens"))
    own = {
        "num_steps": num_steps,
        "layout": dict(view.layout),
        "not_scored": dict(not_scored),
        **metadata,
        "model": {**view.facts, **metadata.get("model", {})},
    }
    if blockwise is not None:
        own["blockwise"] = dict(blockwise)
    if max(results.num_passes.values(), default=1) > 1:
        own.update({name: max(results.counts(name).values(), default=0) for name in ("num_tokens", "num_samples")})
    found = Found(dict(sorted(results.states.items())), results.scores, results.groups, results.replicates)
    return assemble_scores(requests, found, own, keeps_statistics=keep_statistics)


def _require_data(results: Results) -> None:
    if not any(int(state["num_tokens"]) for state in results.states.values()):
        raise HookStateError(
            "no activations collected: run forward passes between attach() and finish(). (A function that "
            "torch.compile compiled before attach() calls no hooks: call torch.compiler.reset() after attach().)"
        )


def _warn_of_uneven_data(counts: Mapping[str, int]) -> None:
    """Warn where sites that see every token have seen different numbers of them."""
    most, least = max(counts, key=counts.__getitem__, default=""), min(counts, key=counts.__getitem__, default="")
    if counts and 0 < counts[least] < counts[most]:
        warnings.warn(
            f"{split_key(most).site} has seen {counts[most]} tokens, {split_key(least).site} {counts[least]}: a "
            "forward pass has ended early (was its error caught?), or a module runs more than once in each. Scores "
            "of places that saw other tokens do not compare.",
            # The caller of `ScoringRun.finish`.
            stacklevel=4,
        )
