"""The content of a score file, made of merged results: which vectors, in which order, with what beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megascore.errors import LayoutError
from megascore.hooks.statistics import State
from megascore.scores.score_file import Scores, Unseen, split_key
from megascore.sites.requests import ScoreRequest
from megascore.sites.targets import TARGETS, WholeModel

__all__ = ["FEW_TOKENS", "assemble_scores", "layer_of"]

MODEL_SITE = "decoder"
"""Site name of vectors that belong to the whole model."""
FEW_TOKENS = 100
"""Experts that fewer routed tokens reached are marked: the mean of 100 numbers that scatter by half their size is known
to 5 %, and that of fewer is known worse."""


def assemble_scores(
    requests: Sequence[ScoreRequest],
    states: Mapping[str, State],
    scores: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    groups: Mapping[str, int] | None = None,
) -> Scores:
    """Return the content of a score file; pure.

    The sites of target ``hidden_size`` are also added up to one vector of the model, as one feature runs through all
    norms; those of target ``layers`` become one vector over the layers. Sites of routed experts carry the number of
    tokens of each expert over the whole world, and ``few_tokens`` for experts reached by some, but fewer than
    `FEW_TOKENS`.

    Args:
        requests: What was scored.
        states: Merged statistics of every site in the world.
        scores: Finished score of every site in the world, [units] float64; not read where no token was seen.
        metadata: Entries beside the sites.
        groups: In how many groups the units of a site compete, by key; a site tells it where the model's facts say
            another number.

    Raises:
        LayoutError: the layers on the ranks do not make up a whole model.
    """
    seen = {key: int(state["num_tokens"]) > 0 for key, state in states.items()}
    values = {key: score for key, score in scores.items() if seen[key]}
    unseen: dict[str, Unseen] = {key: "all" for key, tokens in seen.items() if not tokens}
    unseen.update({key: missing for key in values if (missing := _experts_without_tokens(states[key]))})
    for request in requests:
        ending = f"{request.target}/{request.method}"
        keys = [key for key in states if key.endswith(f"/{ending}")]
        if request.ranked.whole_model is WholeModel.SUM:
            values[f"{MODEL_SITE}/{ending}"] = torch.stack([values[key] for key in keys if seen[key]]).sum(0)
        elif request.ranked.whole_model is WholeModel.STACK:
            vector, missing = _layer_vector(keys, values)
            for key in keys:
                values.pop(key, None)
                unseen.pop(key, None)
            values[f"{MODEL_SITE}/{ending}"] = vector
            if missing:
                unseen[f"{MODEL_SITE}/{ending}"] = missing
    sites = {key: {**_counts(state), **_routing(key, state)} for key, state in states.items()}
    for key, number in (groups or {}).items():
        fact = TARGETS[split_key(key).target].groups
        if number != metadata.get("model", {}).get(fact):
            sites[key]["groups"] = number
    return Scores(values, {**_totals(states, metadata), **metadata, "sites": sites}, unseen)


def layer_of(site: str) -> int:
    """Return the global layer number in a site's name, ``decoder.layers.{number}...``."""
    return int(site.split(".")[2])


def _layer_vector(keys: Sequence[str], values: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Return the scores of all layers [num_layers], and the numbers of those without a token."""
    by_layer = {layer_of(split_key(key).site): key for key in keys}
    if sorted(by_layer) != list(range(len(by_layer))):
        raise LayoutError(f"the ranks together hold the layers {sorted(by_layer)}: expected 0 to {len(by_layer) - 1}.")
    missing = [number for number, key in by_layer.items() if key not in values]
    vector = torch.zeros(len(by_layer), dtype=torch.float64)
    for number, key in by_layer.items():
        if key in values:
            vector[number] = values[key]
    return vector, missing


def _counts(state: State) -> dict[str, int]:
    return {name: int(state[name]) for name in ("num_tokens", "num_samples") if name in state}


def _totals(states: Mapping[str, State], metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return tokens and samples of the whole run: those of the sites that saw all of them.

    Where only routed experts were scored, the tokens are counted from the routing, and samples are not known.
    """
    everything = [_counts(state) for key, state in states.items() if not _is_routed(key)]
    if everything:
        return {name: max(counts.get(name, 0) for counts in everything) for name in ("num_tokens", "num_samples")}
    routed: dict[tuple[int, str], int] = defaultdict(int)
    for key, state in states.items():
        site, target, _ = split_key(key)
        routed[layer_of(site), target] += int(state["num_tokens"])
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
