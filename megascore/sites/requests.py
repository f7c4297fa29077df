"""Which scores a run computes: pairs of a target (what is ranked) and a method (the statistic that ranks it)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from megascore.errors import ConfigError

__all__ = ["METHODS_OF_TARGET", "RECIPES", "ROUTED_TARGETS", "ScoreRequest", "check_iterations", "resolve_scores"]

METHODS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "ffn": ("l2_norm", "independent_contribution", "iterative_contribution"),
    "attention_heads": ("l2_norm",),
    "kv_heads": ("independent_contribution",),
    "hidden_size": ("l2_norm", "layer_norm_contribution"),
    "layers": ("block_similarity",),
    "experts": ("router_weighted_norm",),
    "expert_ffn": ("l2_norm",),
    "shared_expert_ffn": ("l2_norm", "independent_contribution", "iterative_contribution"),
}
"""Every target, with the methods that can rank it; the first is the default."""

ROUTED_TARGETS = ("experts", "expert_ffn")
"""Targets whose sites see the tokens that a router sends them, each once for every expert it goes to."""

OPTIONS_OF_METHOD: dict[str, tuple[str, ...]] = {"iterative_contribution": ("iterations", "calibration_method")}
"""Further keys of an entry of ``scores``, by method."""


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"unknown {what} '{name}'.{hint} Known: {', '.join(names)}.")


@dataclass(frozen=True, order=True)
class ScoreRequest:
    """One entry of ``scores``: rank ``target`` by ``method``."""

    target: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    """Name and value of the options of the method."""
    where_present: bool = field(default=False, compare=False)
    """Leave the entry out where the model has no such module; otherwise that is an error."""

    def __post_init__(self) -> None:
        """Refuse an unknown target, or a method that cannot rank this target.

        Raises:
            ConfigError: naming what exists.
        """
        _check_known("target", self.target, METHODS_OF_TARGET)
        _check_known(f"method of target '{self.target}'", self.method, METHODS_OF_TARGET[self.target])
        for name, _ in self.options:
            _check_known(f"option of method '{self.method}'", name, OPTIONS_OF_METHOD.get(self.method, ()))
        if self.method == "iterative_contribution":
            self.iterative_settings()

    def iterative_settings(self) -> dict[str, Any]:
        """Return the options of `IterativeChannelContributionHook` as it takes them.

        Raises:
            ConfigError: the number of iterations is missing or no positive number, or the calibration is unknown.
        """
        options = dict(self.options)
        iterations, calibration = options.get("iterations"), options.get("calibration_method")
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            raise ConfigError(
                f"method 'iterative_contribution' has iterations={iterations!r}: expected the number of pruning "
                "iterations, which is the number of steps of the run."
            )
        if calibration not in (None, "scale_by_magnitude"):
            raise ConfigError(f"calibration_method is {calibration!r}: expected null or 'scale_by_magnitude'.")
        return {"validation_full_iters": iterations, "calibration_method": calibration}


RECIPES: dict[str, tuple[ScoreRequest, ...]] = {
    "minitron": (
        ScoreRequest("ffn", "l2_norm", where_present=True),
        ScoreRequest("attention_heads", "l2_norm"),
        ScoreRequest("hidden_size", "l2_norm"),
        ScoreRequest("layers", "block_similarity"),
        ScoreRequest("experts", "router_weighted_norm", where_present=True),
        ScoreRequest("expert_ffn", "l2_norm", where_present=True),
        ScoreRequest("shared_expert_ffn", "l2_norm", where_present=True),
    ),
}
"""Named lists of scores. ``minitron``: the activation scores of arXiv:2407.14679, section 2.2, all in one pass; of a
model with experts also theirs."""


def resolve_scores(scores: str | Iterable[Mapping[str, Any] | ScoreRequest]) -> tuple[ScoreRequest, ...]:
    """Turn a recipe name, or a list of ``{target, method}``, into checked requests in the order given.

    Raises:
        ConfigError: unknown recipe, target, method or key, a repeated entry, or an empty list.
    """
    if isinstance(scores, str):
        _check_known("recipe", scores, RECIPES)
        return RECIPES[scores]
    if isinstance(scores, Mapping) or not isinstance(scores, Iterable):
        raise ConfigError(
            f"scores is {scores!r}: expected the name of a recipe ({', '.join(RECIPES)}), or a list of entries such as "
            "{target: ffn}."
        )
    requests = tuple(_resolve_entry(entry, position) for position, entry in enumerate(scores))
    if not requests:
        raise ConfigError(
            f"scores is empty: name a recipe ({', '.join(RECIPES)}) or list entries such as {{target: ffn}}."
        )
    names = [f"{request.target}/{request.method}" for request in requests]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"scores lists {', '.join(sorted(repeated))} more than once: keep one entry of each.")
    return requests


def check_iterations(requests: Iterable[ScoreRequest], num_steps: int) -> None:
    """Refuse an iterative score whose number of iterations is not the number of steps, before the run.

    Raises:
        ConfigError: naming both numbers.
    """
    for request in requests:
        if request.method == "iterative_contribution":
            iterations = request.iterative_settings()["validation_full_iters"]
            if iterations != num_steps:
                raise ConfigError(
                    f"score {request.target}/{request.method} has iterations={iterations}, but the run has {num_steps} "
                    f"steps, and each step is one iteration: set iterations={num_steps}, or change run.steps, "
                    "run.global_batch_size or data.num_samples."
                )


def _resolve_entry(entry: Mapping[str, Any] | ScoreRequest, position: int) -> ScoreRequest:
    if isinstance(entry, ScoreRequest):
        return entry
    if not isinstance(entry, Mapping) or "target" not in entry:
        raise ConfigError(
            f"scores[{position}] is {entry!r}: expected a mapping with 'target' and, if wanted, 'method'."
        )
    target = str(entry["target"])
    _check_known("target", target, METHODS_OF_TARGET)
    method = str(entry.get("method") or METHODS_OF_TARGET[target][0])
    for key in entry:
        known = ("target", "method", *OPTIONS_OF_METHOD.get(method, ()))
        _check_known(f"key in scores[{position}]", str(key), known)
    options = {str(name): value for name, value in entry.items() if name not in ("target", "method")}
    return ScoreRequest(target, method, tuple(sorted(options.items())))
