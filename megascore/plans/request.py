"""What a plan is asked for: ``key=value`` pairs, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from megascore.errors import PlanError
from megascore.sites.targets import TARGETS

__all__ = ["BUDGETS", "CHANNELS", "PlanRequest", "is_plan_key", "parse_request"]

BUDGETS = ("params", "active_params", "memory")
CHANNELS = ("hidden_size", "ffn", "expert_ffn", "shared_expert_ffn")
"""Targets whose sizes are rounded to multiples."""
MULTIPLE_OF = 64
"""What kernels of GPUs work best with."""
UNITS_OF_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

KEYS = frozenset(
    {
        *TARGETS,
        *BUDGETS,
        *(f"method.{target}" for target in TARGETS),
        *(f"multiple_of.{target}" for target in CHANNELS),
        *("axes", "batch", "length", "multiple_of", "tensor_parallel", "expert_parallel"),
        *("per_layer", "model", "same_weights"),
    }
)


def is_plan_key(key: str) -> bool:
    """Tell whether a plan can be asked for something by this key."""
    return key in KEYS


@dataclass(frozen=True)
class PlanRequest:
    """What is asked for."""

    widths: Mapping[str, float | int] = field(default_factory=dict)
    """Sizes by target: a whole number of units, or a fraction below 1 of those that there are."""
    budget: tuple[str, float] | None = None
    """One of `BUDGETS`, and the most that it may come to: parameters, or bytes; below 1 a part of the parent's."""
    axes: tuple[str, ...] | None = None
    """Targets that are cut to meet the budget, all by the same fraction; None for all FFN channels."""
    batch: int = 1
    """Sequences whose keys and values count for a budget of memory."""
    length: int = 4096
    """Positions of each of those sequences."""
    multiples: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(CHANNELS, MULTIPLE_OF))
    """What the size of each of `CHANNELS` is a multiple of."""
    tensor_parallel: int = 1
    expert_parallel: int = 1
    per_layer: bool = False
    """Whether layers may keep different numbers of FFN channels."""
    methods: Mapping[str, str] = field(default_factory=dict)
    """The method that ranks a target, where the score file has several."""
    model: str | None = None
    """The Hugging Face folder; None for the one that the score file names."""
    same_weights: bool = False
    """Whether the user vouches that the folder has the scored weights, where fingerprints can't tell."""


def parse_request(pairs: Mapping[str, Any]) -> PlanRequest:
    """Return what is asked for.

    Args:
        pairs: By key; values as typed on a command line, or as Python has them.

    Raises:
        PlanError: an unknown key, or a value that is none; naming it, and what was expected.
    """
    methods = {key.removeprefix("method."): str(value) for key, value in pairs.items() if key.startswith("method.")}
    for key in pairs:
        if not is_plan_key(key):
            near = get_close_matches(key, KEYS, n=3) or sorted(KEYS)
            raise PlanError(f"a plan has no key '{key}': expected {', '.join(near)}.")
    widths = {target: _width(target, pairs[target]) for target in TARGETS if target in pairs}
    given = [key for key in BUDGETS if key in pairs]
    if len(given) > 1:
        raise PlanError(f"{' and '.join(given)} are given: a plan meets one budget.")
    budget = (given[0], _amount(given[0], pairs[given[0]])) if given else None
    if not widths and budget is None:
        raise PlanError(
            "nothing says how small the model shall be: give a size such as ffn=75% or layers=24, or a budget such as "
            "params=6e9 or memory=40GiB."
        )
    for key in ("axes",) if budget is None else ():
        if key in pairs:
            raise PlanError(
                "axes says what a budget cuts, and there is no budget: give params, active_params or memory."
            )
    return PlanRequest(
        widths=widths,
        budget=budget,
        axes=_axes(pairs["axes"], widths) if "axes" in pairs else None,
        methods=methods,
        model=None if pairs.get("model") is None else str(pairs["model"]),
        per_layer=_flag("per_layer", pairs.get("per_layer", False)),
        same_weights=_flag("same_weights", pairs.get("same_weights", False)),
        **{
            key: _count(key, pairs[key])
            for key in ("batch", "length", "tensor_parallel", "expert_parallel")
            if key in pairs
        },
        multiples={
            target: _count("multiple_of", pairs.get(f"multiple_of.{target}", pairs.get("multiple_of", MULTIPLE_OF)))
            for target in CHANNELS
        },
    )


def _width(target: str, value: Any) -> float | int:
    text = str(value).strip()
    if (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text)) is not None:
        fraction = float(match[1]) / 100
        if not 0 < fraction <= 1:
            raise PlanError(f"{target}={text}: expected more than 0 % and at most 100 %.")
        return 1.0 if fraction == 1 else fraction
    if isinstance(value, float) and 0 < value < 1:
        return value
    return _count(target, value, "a whole number of units, or a part such as 75%")


def _count(key: str, value: Any, expected: str = "a whole number of at least 1") -> int:
    text = str(value).strip()
    if isinstance(value, bool) or re.fullmatch(r"[0-9]{1,12}", text) is None or int(text) < 1:
        raise PlanError(f"{key}={text}: expected {expected}.")
    return int(text)


def _amount(key: str, value: Any) -> float:
    if (part := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", str(value).strip())) is not None:
        if not 0 < float(part[1]) < 100:
            raise PlanError(f"{key}={value}: expected more than 0 % and less than 100 % of the parent's.")
        return float(part[1]) / 100
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]{1,3})?)\s*([A-Za-z]*)", str(value).strip())
    unit = "" if match is None else match[2].upper()
    units = UNITS_OF_BYTES if key == "memory" else {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    amount = float(match[1]) * units[unit] if match is not None and unit in units else math.nan
    if not 1 <= amount < 1e18:
        example = "40GiB" if key == "memory" else "6e9"
        raise PlanError(f"{key}={value}: expected a number such as {example}, or a part such as 80%.")
    return amount


def _axes(value: Any, widths: Mapping[str, Any]) -> tuple[str, ...]:
    names = value.strip("[]").split(",") if isinstance(value, str) else [str(name) for name in value]
    axes = tuple(name.strip() for name in names if name.strip())
    for name in axes:
        if name not in TARGETS:
            raise PlanError(f"axes has '{name}': expected some of {', '.join(TARGETS)}.")
        if name in widths:
            raise PlanError(f"axes has '{name}', whose size is given too: leave one of them out.")
    if not axes:
        raise PlanError("axes is empty: name a target such as ffn, or leave it out.")
    return axes


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise PlanError(f"{key}={value}: expected true or false.")
