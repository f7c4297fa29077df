"""Which scores a run computes: pairs of a target (what is ranked) and a method (the statistic that ranks it)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megascore.errors import ConfigError

__all__ = ["METHODS_OF_TARGET", "RECIPES", "ScoreRequest", "resolve_scores"]

METHODS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "ffn": ("l2_norm",),
    "attention_heads": ("l2_norm",),
    "hidden_size": ("l2_norm",),
    "layers": ("block_similarity",),
}
"""Every target, with the methods that can rank it; the first is the default."""


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

    def __post_init__(self) -> None:
        """Refuse an unknown target, or a method that cannot rank this target.

        Raises:
            ConfigError: naming what exists.
        """
        _check_known("target", self.target, METHODS_OF_TARGET)
        _check_known(f"method of target '{self.target}'", self.method, METHODS_OF_TARGET[self.target])


RECIPES: dict[str, tuple[ScoreRequest, ...]] = {
    "minitron": (
        ScoreRequest("ffn", "l2_norm"),
        ScoreRequest("attention_heads", "l2_norm"),
        ScoreRequest("hidden_size", "l2_norm"),
        ScoreRequest("layers", "block_similarity"),
    ),
}
"""Named lists of scores. ``minitron``: the activation scores of arXiv:2407.14679, section 2.2, all in one pass."""


def resolve_scores(scores: str | Iterable[Mapping[str, Any] | ScoreRequest]) -> tuple[ScoreRequest, ...]:
    """Turn a recipe name, or a list of ``{target, method}``, into checked requests in the order given.

    Raises:
        ConfigError: unknown recipe, target, method or key, a repeated entry, or an empty list.
    """
    if isinstance(scores, str):
        _check_known("recipe", scores, RECIPES)
        return RECIPES[scores]
    requests = tuple(_resolve_entry(entry, position) for position, entry in enumerate(scores))
    if not requests:
        raise ConfigError(
            f"scores is empty: name a recipe ({', '.join(RECIPES)}) or list entries such as {{target: ffn}}."
        )
    repeated = {f"{r.target}/{r.method}" for r in requests if requests.count(r) > 1}
    if repeated:
        raise ConfigError(f"scores lists {', '.join(sorted(repeated))} more than once: keep one entry of each.")
    return requests


def _resolve_entry(entry: Mapping[str, Any] | ScoreRequest, position: int) -> ScoreRequest:
    if isinstance(entry, ScoreRequest):
        return entry
    if not isinstance(entry, Mapping) or "target" not in entry:
        raise ConfigError(
            f"scores[{position}] is {entry!r}: expected a mapping with 'target' and, if wanted, 'method'."
        )
    for key in entry:
        _check_known(f"key in scores[{position}]", str(key), ("target", "method"))
    target = str(entry["target"])
    _check_known("target", target, METHODS_OF_TARGET)
    return ScoreRequest(target, str(entry.get("method") or METHODS_OF_TARGET[target][0]))
