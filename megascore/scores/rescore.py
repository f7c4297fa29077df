"""Scores computed again from the statistics in score files: by other methods, or over the data of several runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megascore.errors import ScoreFileError
from megascore.hooks.registry import methods_of
from megascore.hooks.statistics import State
from megascore.hooks.weights import WEIGHT_TOLERANCE
from megascore.scores.assemble import Found, assemble_scores
from megascore.scores.score_file import Scores, Unseen, split_key
from megascore.sites.replicates import grouped_sums, replicates, unit_scores
from megascore.sites.requests import ScoreRequest, resolve_scores
from megascore.sites.site import MOMENTS
from megascore.sites.step_groups import without_groups

__all__ = ["merge", "rescore"]

SAME = ("weights_fingerprint", "model")
"""Entries of the metadata in which files must not differ to be merged."""
OF_ONE_RUN = (
    "run_fingerprint",
    "created",
    "versions",
    "sites",
    "scores",
    "num_tokens",
    "num_samples",
    "schema_version",
)
"""Entries that are not those of a merged file."""

_NO_DATA: State = {name: torch.zeros((), dtype=torch.int64) for name in ("num_calls", "num_tokens")}


def rescore(scores: Scores, wanted: Mapping[str, str] | Iterable[Mapping[str, Any]]) -> Scores:
    """Return scores with further methods, computed from the statistics in them; what was there stays.

    Args:
        scores: From a run that kept what the methods need: with ``scores: all``, or methods that need the same.
        wanted: A method for each target, or a list of ``{target, method}``.

    Raises:
        ConfigError: an unknown target or method.
        ScoreFileError: the file does not have the statistics that a method needs, which are named.
    """
    entries = [{"target": t, "method": m} for t, m in wanted.items()] if isinstance(wanted, Mapping) else list(wanted)
    requests = resolve_scores(entries)
    found = _found(scores, scores.statistics, requests, _tokens_of_sites([scores]))
    new = assemble_scores(requests, found, _facts(scores.metadata), keeps_statistics=False)
    values = {**scores, **new}
    unseen: dict[str, Unseen] = {**scores.unseen, **new.unseen}
    metadata = scores.metadata
    metadata["sites"] = {**metadata["sites"], **new.metadata["sites"]}
    metadata.pop("scores", None)
    metadata.pop("schema_version", None)
    uncertainty = {**scores.uncertainty, **new.uncertainty}
    return Scores(values, metadata, unseen, uncertainty=uncertainty, statistics=scores.statistics)


def merge(files: Sequence[Scores]) -> Scores:
    """Return the scores over the data of several runs of one model, as one run over all of it would give them.

    Args:
        files: Of one model, with the same scores, each with its statistics, of different data.

    Raises:
        ScoreFileError: they are of different models, weights, scores or methods, or of the same data; or a score is of
            a kind that can't be merged.
    """
    if len(files) < 2:
        raise ScoreFileError(f"{len(files)} score files are no two: name at least two to merge.")
    first = files[0]
    for number, other in enumerate(files[1:], start=2):
        _refuse_different(first, other, number)
    _refuse_same_data(files)
    requests = resolve_scores([dict(zip(("target", "method"), name.split("/"), strict=True)) for name in _names(first)])
    # A file has no statistics of an expert, say, that no token reached.
    keys = {key: None for scores in files for key in scores.statistics}
    states = {key: _sum([scores.statistics[key] for scores in files if key in scores.statistics]) for key in keys}
    found = _found(first, states, requests, _tokens_of_sites(files))
    return assemble_scores(requests, found, _merged_metadata(files))


def _names(scores: Scores) -> list[str]:
    return sorted({f"{key.target}/{key.method}" for key in map(split_key, [*scores, *scores.unseen])})


def _tokens_of_sites(files: Sequence[Scores]) -> dict[str, int]:
    """Return how many tokens reached each site, in all files together, by key."""
    found: dict[str, int] = {}
    for scores in files:
        for key, site in scores.metadata["sites"].items():
            found[key] = found.get(key, 0) + int(site["num_tokens"])
    return found


def _sites_without_tokens(request: ScoreRequest, tokens: Mapping[str, int]) -> set[str]:
    """Return keys of a request's scores at sites that no token reached; they have no statistics."""
    of_site: dict[str, dict[str, int]] = {}
    for key, number in tokens.items():
        site, target, method = split_key(key)
        if target == request.target:
            of_site.setdefault(site, {})[method] = number
    return {
        f"{site}/{request.target}/{request.method}"
        for site, of_method in of_site.items()
        # A method of a family that was not asked for in the run has the tokens of the others.
        if not of_method.get(request.method, max(of_method.values()))
    }


def _found(
    scores: Scores, states: Mapping[str, State], requests: Sequence[ScoreRequest], tokens: Mapping[str, int]
) -> Found:
    """Return scores of requests, computed from statistics."""
    states = dict(states)
    units = _num_units(scores)
    values: dict[str, Tensor] = {}
    of_groups: dict[str, Tensor] = {}
    groups: dict[str, int] = {}
    told_groups = {
        split_key(key)[:2]: own["groups"] for key, own in scores.metadata["sites"].items() if "groups" in own
    }
    for request in requests:
        hook: Any = request.definition.hook
        own = _states_of(request, states)
        for score_key in _sites_without_tokens(request, tokens):
            states[score_key], values[score_key] = _NO_DATA, torch.zeros(1)
        for key, state in own.items():
            score_key = f"{key.rpartition('/')[0]}/{request.method}"
            compute = _computing(request, state, units.get(split_key(key)[:2]))
            values[score_key] = compute(without_groups(state))
            of_groups[score_key] = replicates(state, compute, hook.grows_with)
            told = told_groups.get(split_key(key)[:2])
            if told is not None:
                groups[score_key] = told
    return Found(states, values, groups, of_groups)


def _states_of(request: ScoreRequest, states: Mapping[str, State]) -> dict[str, State]:
    """Return the statistics from which a method can be computed, by key.

    Raises:
        ScoreFileError: there are none, or they lack something.
    """
    hook: Any = request.definition.hook
    name = f"{request.target}/{request.method}"
    if not isinstance(inspect.getattr_static(hook, "compute"), classmethod) or not hook.additive:
        raise ScoreFileError(
            f"{name} can't be computed from statistics of a file: it needs the hook that ran. Score again with it."
        )
    of_target = {key: state for key, state in states.items() if split_key(key).target == request.target}
    found = {}
    missing: set[str] = set()
    for key, state in of_target.items():
        label = split_key(key).method
        if hook.shared is None:
            is_own = label == request.method
        else:
            lacking = {needed for needed in hook.keeps if needed not in state}
            is_own = _shares(label, request, hook) and not lacking
            missing |= lacking if _shares(label, request, hook) else set()
        if is_own:
            found[key] = state
    if not found:
        kept = sorted({n for state in of_target.values() for n in without_groups(state)}) or ["nothing"]
        lacks = ", ".join(sorted(missing)) or f"those of {request.method} itself"
        raise ScoreFileError(
            f"{name} needs statistics that are not in the file ({lacks}); of {request.target} it keeps "
            f"{', '.join(kept)}. Score again with 'scores: all', or with this method in the list."
        )
    return found


def _shares(label: str, request: ScoreRequest, hook: Any) -> bool:
    """Tell whether the statistics under a label are of the family of methods that a hook belongs to."""
    if label == MOMENTS:
        return True
    others = methods_of(request.target)
    return label in others and getattr(others[label].hook, "shared", None) is hook.shared


def _computing(request: ScoreRequest, state: State, num_units: int | None) -> Any:
    hook: Any = request.definition.hook
    channels = {name: value for name, value in without_groups(state).items() if value.dim()}
    num_channels = max((value.shape[0] for value in channels.values()), default=1)
    size = num_channels // num_units if request.ranked.heads and num_units and not hook.units_are_heads else 1
    return partial(unit_scores, hook, unit_size=size)


def _num_units(scores: Scores) -> dict[tuple[str, str], int]:
    """Return how many units are ranked, by site and target."""
    return {split_key(key)[:2]: len(values) for key, values in scores.items()}


def _sum(states: Sequence[State]) -> dict[str, Tensor]:
    """Add up statistics; what is no sum is the same in all of them."""
    summed = grouped_sums(states[0])
    return {
        name: torch.stack([state[name] for state in states]).sum(0) if name in summed else value
        for name, value in states[0].items()
    }


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in OF_ONE_RUN or name.startswith("num_")}


def _refuse_different(first: Scores, other: Scores, number: int) -> None:
    """Refuse files that can't be merged.

    Raises:
        ScoreFileError: naming what differs.
    """
    differences = [
        f"{name} is {theirs!r} there, {own!r} in the first"
        for name in SAME
        for own, theirs in [(_same_fact(first, name), _same_fact(other, name))]
        if own != theirs
    ]
    if _names(first) != _names(other):
        differences.append(f"it has the scores {', '.join(_names(other))}, the first {', '.join(_names(first))}")
    if not first.statistics or not other.statistics:
        differences.append("it, or the first, keeps no statistics")
    elif first.metadata["sites"].keys() != other.metadata["sites"].keys():
        differences.append("it has scores of other sites than the first")
    differences = differences or _different_statistics(first.statistics, other.statistics)
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ScoreFileError(f"score file {number} can't be merged with the first: {shown}.")


def _different_statistics(first: Mapping[str, State], other: Mapping[str, State]) -> list[str]:
    """Name the sites whose statistics are of another shape, or of other weights."""
    found = []
    for key, state in first.items():
        theirs = other.get(key)
        if theirs is None:
            continue
        if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in theirs.items()}:
            found.append(f"the statistics of {key} are others than in the first")
            continue
        for name in set(without_groups(state)) - grouped_sums(state):
            if not torch.allclose(state[name].double(), theirs[name].double(), rtol=WEIGHT_TOLERANCE, atol=0):
                why = "" if name == "span" else ": the weights differ"
                found.append(f"{name} of {key} is another{why}")
    return found


def _same_fact(scores: Scores, name: str) -> Any:
    value = scores.metadata.get(name)
    # A name and a path may differ where the weights are the same.
    return {k: v for k, v in value.items() if k not in ("name", "path")} if isinstance(value, dict) else value


def _refuse_same_data(files: Sequence[Scores]) -> None:
    found: dict[str, int] = {}
    for number, scores in enumerate(files, start=1):
        data = scores.metadata.get("data_fingerprint")
        if data is not None and data in found:
            raise ScoreFileError(
                f"score files {found[data]} and {number} are of the same data ({data[:12]}...), which would "
                "count twice: merge files of different text."
            )
        if data is not None:
            found[data] = number


def _merged_metadata(files: Sequence[Scores]) -> dict[str, Any]:
    """Return the metadata of a merged file: what all have, and of each file what differs."""
    all_metadata = [scores.metadata for scores in files]
    common = {
        name: value
        for name, value in all_metadata[0].items()
        if name not in OF_ONE_RUN and all(other.get(name) == value for other in all_metadata)
    }
    losses = [(m.get("loss"), m.get("num_tokens", 0)) for m in all_metadata]
    if all(loss is not None for loss, _ in losses):
        common["loss"] = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    told = (
        "run_fingerprint",
        "data_fingerprint",
        "data",
        "num_tokens",
        "num_samples",
        "num_steps",
        "layout",
        "created",
    )
    return {
        **common,
        "num_steps": sum(int(m.get("num_steps", 0)) for m in all_metadata),
        "merged": [{name: m[name] for name in told if name in m} for m in all_metadata],
    }
