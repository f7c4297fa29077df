"""The content of a score file, made of merged results: which vectors, in which order, with what beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megascore.errors import LayoutError
from megascore.hooks.registry import methods_of
from megascore.hooks.statistics import State
from megascore.scores.score_file import Scores, Unseen, split_key
from megascore.scores.uncertainty import Measured, Uncertainty, uncertainties
from megascore.sites.replicates import groups_with_data
from megascore.sites.requests import ScoreRequest
from megascore.sites.site import MOMENTS
from megascore.sites.targets import TARGETS, WholeModel

__all__ = ["FEW_TOKENS", "MODEL_SITE", "Found", "assemble_scores", "layer_of", "state_key"]

MODEL_SITE = "decoder"
"""Site name of vectors that belong to the whole model."""
FEW_TOKENS = 100
"""Experts that fewer routed tokens reached are marked: the mean of 100 numbers that scatter by half their size is known
to 5 %, and that of fewer is known worse."""


@dataclass(frozen=True)
class Found:
    """What was measured in the whole world."""

    states: Mapping[str, State]
    """Merged statistics of every site, by ``site/target/method``, or ``moments`` for the method of several."""
    scores: Mapping[str, Tensor]
    """Finished score of every site, [units] float64, by ``site/target/method``; not read where no token was seen."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """In how many groups the units of a site compete, by key; a site tells it where the model's facts say another
    number."""
    replicates: Mapping[str, Tensor] = field(default_factory=dict)
    """Scores without each group of steps in turn, [groups, units]."""

    def state(self, key: str) -> State:
        """Return the statistics behind a score."""
        return self.states[state_key(key, self.states)]

    def saw_tokens(self, key: str) -> bool:
        """Whether a token reached the site of a score."""
        return int(self.state(key)["num_tokens"]) > 0


@dataclass
class _Vectors:
    """Vectors of the score file, on their way into it."""

    values: dict[str, Tensor] = field(default_factory=dict)
    unseen: dict[str, Unseen] = field(default_factory=dict)
    replicates: dict[str, Tensor] = field(default_factory=dict)


def assemble_scores(
    requests: Sequence[ScoreRequest], found: Found, metadata: Mapping[str, Any], *, keeps_statistics: bool = True
) -> Scores:
    """Return the content of a score file; pure.

    The sites of target ``hidden_size`` are also added up to one vector of the model, as one feature runs through all
    norms; those of target ``layers`` become one vector over the layers. Sites of routed experts carry the number of
    tokens of each expert over the whole world, and ``few_tokens`` for experts reached by some, but fewer than
    `FEW_TOKENS`.

    Args:
        requests: What was scored.
        found: What was measured.
        metadata: Entries beside the sites.
        keeps_statistics: Whether the file has the statistics, too, to be scored again and merged with others.

    Raises:
        LayoutError: the layers on the ranks do not make up a whole model.
    """
    keys = sorted(found.scores)
    vectors = _vectors_of_sites(keys, found)
    for request in requests:
        ending = f"/{request.target}/{request.method}"
        own = [key for key in keys if key.endswith(ending)]
        if request.ranked.whole_model is WholeModel.SUM:
            _add_sum(f"{MODEL_SITE}{ending}", [key for key in own if found.saw_tokens(key)], vectors)
        elif request.ranked.whole_model is WholeModel.STACK:
            _stack_layers(f"{MODEL_SITE}{ending}", own, vectors)
    sites: dict[str, dict[str, Any]] = {
        key: {**_counts(found.state(key)), **_routing(key, found.state(key))} for key in keys
    }
    for key, number in found.groups.items():
        fact = TARGETS[split_key(key).target].groups
        if number != metadata.get("model", {}).get(fact):
            sites[key]["groups"] = number
    content = {**_totals(found, metadata), **metadata, "sites": sites}
    return Scores(
        vectors.values,
        content,
        vectors.unseen,
        uncertainty=_uncertainty(vectors, content),
        statistics={key: state for key, state in found.states.items() if _adds_up(key) and int(state["num_tokens"])}
        if keeps_statistics
        else {},
    )


def state_key(key: str, states: Mapping[str, Any]) -> str:
    """Return the key of the statistics behind a score: its own, or those of several methods of the target.

    Raises:
        KeyError: there are none.
    """
    shared = f"{key.rpartition('/')[0]}/{MOMENTS}"
    return key if key in states or shared not in states else shared


def layer_of(site: str) -> int:
    """Return the global layer number in a site's name, ``decoder.layers.{number}...``."""
    return int(site.split(".")[2])


def _vectors_of_sites(keys: Sequence[str], found: Found) -> _Vectors:
    vectors = _Vectors()
    for key in keys:
        if not found.saw_tokens(key):
            vectors.unseen[key] = "all"
            continue
        vectors.values[key] = found.scores[key]
        missing = _experts_without_tokens(found.state(key))
        if missing:
            vectors.unseen[key] = missing
        used = groups_with_data(found.state(key))
        if key in found.replicates and len(used) > 1:
            vectors.replicates[key] = found.replicates[key][used]
    return vectors


def _add_sum(name: str, keys: Sequence[str], vectors: _Vectors) -> None:
    """Add the vector of the whole model that is the sum over sites, all of which see the same tokens."""
    vectors.values[name] = torch.stack([vectors.values[key] for key in keys]).sum(0)
    if all(key in vectors.replicates for key in keys):
        vectors.replicates[name] = torch.stack([vectors.replicates[key] for key in keys]).sum(0)


def _stack_layers(name: str, keys: Sequence[str], vectors: _Vectors) -> None:
    """Put one vector over the layers in the place of the layers' own."""
    by_layer = {layer_of(split_key(key).site): key for key in keys}
    if sorted(by_layer) != list(range(len(by_layer))):
        raise LayoutError(f"the ranks together hold the layers {sorted(by_layer)}: expected 0 to {len(by_layer) - 1}.")
    ordered = [by_layer[number] for number in range(len(by_layer))]
    seen = [key for key in ordered if key in vectors.values]
    missing = [number for number, key in enumerate(ordered) if key not in vectors.values]
    vector = torch.zeros(len(by_layer), dtype=torch.float64)
    for number, key in enumerate(ordered):
        vectors.unseen.pop(key, None)
        if key in vectors.values:
            vector[number] = vectors.values.pop(key)
    vectors.values[name] = vector
    if missing:
        vectors.unseen[name] = missing
    replicates = {key: vectors.replicates.pop(key) for key in seen if key in vectors.replicates}
    if replicates and len(replicates) == len(seen) and len({len(values) for values in replicates.values()}) == 1:
        # No number matters for a layer that has no score.
        nothing = torch.zeros_like(next(iter(replicates.values())))
        vectors.replicates[name] = torch.cat([replicates.get(key, nothing) for key in ordered], dim=1)


def _uncertainty(vectors: _Vectors, metadata: Mapping[str, Any]) -> dict[str, Uncertainty]:
    measured = {}
    for key, replicates in vectors.replicates.items():
        score, unseen = vectors.values[key], vectors.unseen.get(key, [])
        assert unseen != "all", "a vector without a token has no replicates"
        measured[key] = Measured(score, replicates, _num_competing(key, len(score), metadata), tuple(unseen))
    return uncertainties(measured, int(metadata["num_tokens"]))


def _num_competing(key: str, num_units: int, metadata: Mapping[str, Any]) -> int:
    """Return in how many groups units compete, as far as it is known; `rankings` complains of what does not fit."""
    fact = TARGETS[split_key(key).target].groups
    number = metadata["sites"].get(key, {}).get("groups", metadata.get("model", {}).get(fact)) if fact else 1
    if not isinstance(number, int) or number < 1 or num_units % number or number == num_units:
        return 1
    return number


def _adds_up(key: str) -> bool:
    """Tell whether statistics can be added to those of other data: decisions that follow one another can't."""
    _, target, method = split_key(key)
    hook: Any = None if method == MOMENTS else methods_of(target)[method].hook
    return hook is None or bool(hook.additive)


def _counts(state: State) -> dict[str, int]:
    return {name: int(state[name]) for name in ("num_tokens", "num_samples") if name in state}


def _totals(found: Found, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return tokens and samples of the whole run: those of the sites that saw all of them.

    Where only routed experts were scored, the tokens are counted from the routing, and samples are not known.
    """
    everything = [_counts(state) for key, state in found.states.items() if not _is_routed(key)]
    if everything:
        return {name: max(counts.get(name, 0) for counts in everything) for name in ("num_tokens", "num_samples")}
    routed: dict[tuple[int, str, str], int] = defaultdict(int)
    for key, state in found.states.items():
        site, target, method = split_key(key)
        routed[layer_of(site), target, method] += int(state["num_tokens"])
    return {"num_tokens": max(routed.values()) // int(metadata.get("model", {}).get("experts_per_token", 1))}


def _is_routed(key: str) -> bool:
    return TARGETS[split_key(key).target].routed


def _routing(key: str, state: State) -> dict[str, Any]:
    """Return what a site of routed experts tells beside its scores; nothing for other sites."""
    if not _is_routed(key):
        return {}
    tokens = state["tokens_per_expert"].tolist() if "tokens_per_expert" in state else [int(state["num_tokens"])]
    few = [expert for expert, count in enumerate(tokens) if 0 < count < FEW_TOKENS]
    if "tokens_per_expert" in state:
        return {"tokens_per_expert": tokens, "few_tokens": few}
    return {"few_tokens": bool(few)}


def _experts_without_tokens(state: State) -> list[int]:
    tokens = state.get("tokens_per_expert")
    return [] if tokens is None else (tokens == 0).nonzero().flatten().tolist()
