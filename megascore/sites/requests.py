"""The scores that a run computes: pairs of a target (what is ranked) and a method (the statistic that ranks it)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import megascore.hooks  # noqa: F401 - the methods that come with the package
from megascore.errors import ConfigError
from megascore.hooks.method import Method
from megascore.hooks.registry import methods_of
from megascore.sites.targets import TARGETS, PlaceKind, Target, check_methods

__all__ = [
    "RECIPES",
    "ScoreRequest",
    "check_num_steps",
    "names_of_methods",
    "recipe",
    "refuse_needing_job",
    "resolve_scores",
]


def names_of_methods(target: str) -> tuple[str, ...]:
    """Return the names of all methods that can rank a target, the default first.

    Raises:
        ConfigError: there is no such target.
    """
    _check_known("target", target, TARGETS)
    default = TARGETS[target].default_method
    return (default, *(name for name in methods_of(target) if name != default))


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
        """Refuse an unknown target, a method that cannot rank this target, or options that the method does not take.

        Raises:
            ConfigError: naming what exists.
        """
        _check_known(f"method of target '{self.target}'", self.method, names_of_methods(self.target))
        for name, _ in self.options:
            _check_known(f"option of method '{self.method}'", name, self.definition.options)
        self.definition.hook.check_options(dict(self.options))

    @property
    def definition(self) -> Method:
        """The method as its hook class defines it."""
        return methods_of(self.target)[self.method]

    @property
    def ranked(self) -> Target:
        """The target as the table of targets has it."""
        return TARGETS[self.target]

    @property
    def kind(self) -> PlaceKind:
        """The kind of module at which the target is measured."""
        return self.ranked.kind

    @property
    def num_steps(self) -> int | None:
        """The number of steps that a run must have; None where any number will do."""
        return self.definition.hook.num_steps(dict(self.options))


RECIPES: dict[str, tuple[ScoreRequest, ...]] = {
    "low_loss": (
        ScoreRequest("ffn", "fluctuation", where_present=True),
        ScoreRequest("attention_heads", "independent_contribution"),
        ScoreRequest("kv_heads", "independent_contribution", where_present=True),
        ScoreRequest("hidden_size", "l2_norm"),
        ScoreRequest("layers", "block_similarity"),
        ScoreRequest("experts", "router_weighted_norm", where_present=True),
        ScoreRequest("expert_ffn", "fluctuation", where_present=True),
        ScoreRequest("shared_expert_ffn", "fluctuation", where_present=True),
    ),
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
"""Named lists of scores, each in one pass. ``low_loss``: for each target what lost least, by
tests/benchmarks/quality.py, of what needs no further forward passes. ``minitron``: the activation scores of
arXiv:2407.14679, section 2.2; of a model with experts also theirs."""


ALL = "all"
"""The recipe of every score that can be had in one pass, whatever its methods are: those that come later, too."""


def recipe(name: str) -> tuple[ScoreRequest, ...]:
    """Return the scores of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    _check_known("recipe", name, (*RECIPES, ALL))
    if name in RECIPES:
        return RECIPES[name]
    return tuple(
        ScoreRequest(target, method, where_present=True)
        for target in TARGETS
        for method in names_of_methods(target)
        if _in_one_pass(methods_of(target)[method])
    )


def _in_one_pass(method: Method) -> bool:
    hook: Any = method.hook
    return bool(hook.additive and not hook.is_large and not hook.needs_job)


def resolve_scores(scores: str | Iterable[Mapping[str, Any] | ScoreRequest]) -> tuple[ScoreRequest, ...]:
    """Turn a recipe name, or a list of ``{target, method}``, into checked requests in the order given.

    Raises:
        ConfigError: unknown recipe, target, method or key, a repeated entry, or an empty list.
    """
    check_methods()
    if isinstance(scores, str):
        return recipe(scores)
    if isinstance(scores, Mapping) or not isinstance(scores, Iterable):
        raise ConfigError(
            f"scores is {scores!r}: expected the name of a recipe ({', '.join((*RECIPES, ALL))}), or a list of "
            "entries such as {target: ffn}."
        )
    requests = tuple(_resolve_entry(entry, position) for position, entry in enumerate(scores))
    if not requests:
        raise ConfigError(
            f"scores is empty: name a recipe ({', '.join((*RECIPES, ALL))}) or list entries such as {{target: ffn}}."
        )
    names = [f"{request.target}/{request.method}" for request in requests]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ConfigError(f"scores lists {', '.join(sorted(repeated))} more than once: keep one entry of each.")
    return requests


def check_num_steps(requests: Iterable[ScoreRequest], num_steps: int) -> None:
    """Refuse a score that takes a certain number of steps where a run has another one, before the run.

    Raises:
        ConfigError: naming both numbers.
    """
    for request in requests:
        wanted = request.num_steps
        if wanted not in (None, num_steps):
            raise ConfigError(
                f"score {request.target}/{request.method} has iterations={wanted}, but the run has {num_steps} "
                f"steps, and each step is one iteration: set iterations={num_steps}, or change run.steps, "
                "run.global_batch_size or data.num_samples."
            )


def refuse_needing_job(requests: Iterable[ScoreRequest], where: str) -> None:
    """Refuse scores that only a job can measure, which runs the whole model itself. Not collective.

    Args:
        requests: What is asked for.
        where: What is no such job, for the error: "attach".

    Raises:
        ConfigError: naming the scores.
    """
    names = [f"{request.target}/{request.method}" for request in requests if request.definition.hook.needs_job]
    if names:
        raise ConfigError(
            f"{where} can't measure {', '.join(names)}: that takes further passes of the whole model, without "
            "layers, over several of them, or backward. Use a job that runs the model itself, torchrun -m "
            "megascore score CONFIG with run.blockwise=false; or take a method of one forward pass."
        )


def _resolve_entry(entry: Mapping[str, Any] | ScoreRequest, position: int) -> ScoreRequest:
    if isinstance(entry, ScoreRequest):
        return entry
    if not isinstance(entry, Mapping) or "target" not in entry:
        raise ConfigError(
            f"scores[{position}] is {entry!r}: expected a mapping with 'target' and, if wanted, 'method'."
        )
    target = str(entry["target"])
    names = names_of_methods(target)
    method = str(entry.get("method") or names[0])
    own_options = methods_of(target)[method].options if method in names else ()
    for key in entry:
        _check_known(f"key in scores[{position}]", str(key), ("target", "method", *own_options))
    options = {str(name): value for name, value in entry.items() if name not in ("target", "method")}
    return ScoreRequest(target, method, tuple(sorted(options.items())))
