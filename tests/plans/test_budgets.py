"""Budgets on each axis: the plan meets it, and the next larger size that the rules allow would not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from megascore.errors import PlanError
from megascore.plans.choose import choose_layers
from megascore.plans.orders import RandomOrders
from megascore.plans.parent import Parent
from megascore.plans.request import parse_request
from megascore.plans.sizes import resolve_sizes, sizes_of_parent
from tests.models import save_checkpoint
from tests.smaller import random_plan

BUDGETS = ("params", "active_params", "memory")
RULES: dict[str, Any] = {"batch": 3, "length": 100, "multiple_of": 4}
"""Of all plans here; keys and values of 3 sequences are a good part of such a small model's memory."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}),
    "heads of their own": ("qwen2", {"num_key_value_heads": 4}),
    "hidden by heads": ("llama", {}),
    "experts": ("mixtral", {}),
    "experts and a dense layer": ("qwen3_moe", {}),
}
DENSE = ("ffn", "hidden_size", "layers", "attention_heads", "kv_heads")
EXPERTS = ("experts", "expert_ffn", "hidden_size", "layers", "attention_heads", "kv_heads")
CASES = [
    (model, axis, budget)
    for model, axes in {
        "grouped heads": DENSE,
        "heads of their own": DENSE,
        "hidden by heads": DENSE,
        "experts": EXPERTS,
        "experts and a dense layer": (*EXPERTS, "ffn"),
    }.items()
    for axis in axes
    for budget in BUDGETS
    # A token meets as many experts as before, so hardly anything is won.
    if (axis, budget) != ("experts", "active_params")
]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parent]:
    root = tmp_path_factory.mktemp("parents")
    return {
        name: Parent.of(save_checkpoint(root / name, family, **changes)) for name, (family, changes) in MODELS.items()
    }


def sizes(parent: Parent, **wanted: Any) -> dict[str, int]:
    """Return the sizes that meet a request; which layers go is told by the orders of `random_plan`."""
    request, orders = parse_request({**RULES, **wanted}), RandomOrders(0)
    return resolve_sizes(
        request, parent.config, parent.bytes_per_value, lambda number: choose_layers(parent.config, number, orders)
    )


def cost(parent: Parent, budget: str, axis: str, width: int) -> float:
    """Return what the model costs with one width cut, and whatever goes with it, as the plan of that width counts."""
    after = random_plan(parent.folder, **{axis: width}, multiple_of=RULES["multiple_of"]).after
    cache = after.kv_cache_bytes_per_token * RULES["batch"] * RULES["length"]
    return {"params": after.parameters, "active_params": after.active_parameters, "memory": after.bytes + cache}[budget]


def allowed_widths(parent: Parent, axis: str) -> Iterator[int]:
    """Yield every width of an axis that a plan can be asked for, ascending; what the rules refuse is left out."""
    for width in range(1, sizes_of_parent(parent.config)[axis] + 1):
        try:
            sizes(parent, **{axis: width})
        except PlanError:
            continue
        yield width


@pytest.mark.parametrize(("model", "axis", "budget"), CASES)
def test_a_budget_on_an_axis_is_met_and_the_next_larger_width_would_not_meet_it(
    model: str, axis: str, budget: str, parents: dict[str, Parent]
) -> None:
    parent = parents[model]
    widths = list(allowed_widths(parent, axis))
    costs = {width: cost(parent, budget, axis, width) for width in widths}
    assert list(costs.values()) == sorted(costs.values()), "a wider model costs no less"
    assert len(widths) > 1, "there is something to choose from"
    # Exactly what a width costs, one less, and between two widths.
    for width, wider in pairwise(widths):
        for most, expected in ((costs[width], width), (costs[wider] - 1, width)):
            found = sizes(parent, **{budget: str(int(most)), "axes": axis})
            assert found == sizes(parent, **{axis: expected}), (most, costs)
    with pytest.raises(PlanError, match="can't be met by .* alone"):
        sizes(parent, **{budget: str(int(costs[widths[0]]) - 1), "axes": axis})
