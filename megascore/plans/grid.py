"""Plans that meet one budget in different ways: a grid of sizes, and one axis that takes what is left to go."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from megascore.errors import PlanError
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan, plan_for
from megascore.plans.request import BUDGETS, parse_request
from megascore.scores.score_file import Scores, split_key
from megascore.sites.targets import TARGETS

__all__ = ["candidate_plans", "sizes_text"]

DEFAULT_GRID: Mapping[str, tuple[str, ...]] = {
    "layers": ("100%", "95%", "90%", "85%", "80%"),
    "hidden_size": ("100%", "94%", "88%"),
}
"""Of the axes that have scores. Hidden features are cut in small steps: they cost most where nothing is trained."""
FREE = ("ffn", "expert_ffn")
"""Axes that meet the budget where nothing else is said."""
ALONE = ("ffn", "expert_ffn", "experts", "layers", "hidden_size", "attention_heads", "kv_heads")
"""Axes that are tried alone, too, where they have scores and can meet the budget."""


def candidate_plans(scores: Scores, path: str, parent: Parent, wanted: Mapping[str, str]) -> dict[str, Plan]:
    """Return the plans of a search by their names; all meet the budget, and no two have the same sizes.

    Args:
        scores: What ranks the units.
        path: Where they are.
        parent: The model.
        wanted: A budget, rules and ``model`` as for a plan; ``axes`` is what meets the budget. Targets have lists of
            sizes, such as ``layers=24,27,30``; without any, `DEFAULT_GRID` is taken.

    Raises:
        PlanError: no budget, a wrong key or size, or no plan that meets the budget.
    """
    grid = {key: _sizes(key, text) for key, text in wanted.items() if key in TARGETS}
    rest = {key: value for key, value in wanted.items() if key not in TARGETS}
    if not set(rest) & set(BUDGETS):
        raise PlanError(f"a search needs a budget: give {', '.join(BUDGETS)}, such as params=80%.")
    scored = {split_key(key).target for key in scores}
    free = _free(rest.pop("axes", None), scored, grid)
    if not grid:
        grid = {target: sizes for target, sizes in DEFAULT_GRID.items() if target in scored and target not in free}
    requests: list[dict[str, Any]] = [{**rest, "axes": [axis]} for axis in ALONE if axis in scored and axis not in grid]
    requests += [{**rest, "axes": [axis]} for axis in grid if axis in scored]
    for sizes in itertools.product(*grid.values()):
        requests.append({**rest, **dict(zip(grid, sizes, strict=True)), "axes": list(free)})
    found: dict[str, Plan] = {}
    refused = ""
    for request in requests:
        try:
            made = plan_for(scores, path, parent, parse_request(request))
        except PlanError as error:
            # Not every point of a grid can meet the budget, or goes with the rules.
            refused = refused or str(error)
            continue
        found.setdefault(sizes_text(made), made)
    if not found:
        raise PlanError(f"no plan of the grid meets the budget; the first was refused as: {refused}")
    return found


def sizes_text(plan: Plan) -> str:
    """Return the sizes of a plan that are not the parent's, such as ``ffn 960, layers 28``."""
    changed = (target for target, before in plan.sizes_before.items() if plan.sizes_after[target] != before)
    return ", ".join(f"{target} {plan.sizes_after[target]}" for target in changed)


def _sizes(key: str, text: str) -> tuple[str, ...]:
    sizes = tuple(part.strip() for part in text.strip("[]").split(",") if part.strip())
    if not sizes:
        raise PlanError(f"{key}={text}: expected sizes such as {key}=100%,90%,80%.")
    return sizes


def _free(axes: str | None, scored: set[str], grid: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    if axes is not None:
        return tuple(name.strip() for name in axes.strip("[]").split(",") if name.strip())
    found = tuple(axis for axis in FREE if axis in scored and axis not in grid)
    if not found:
        raise PlanError(
            f"nothing is left to meet the budget with: the score file has scores of {', '.join(sorted(scored))}, and "
            f"the grid has {', '.join(grid)}. Name what meets it, axes=TARGET."
        )
    return found
