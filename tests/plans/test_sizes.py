"""Sizes that the rules allow, and budgets that are met with the most that they allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascore.errors import PlanError
from megascore.plans.parent import Parent
from megascore.plans.request import parse_request
from megascore.plans.sizes import resolve_sizes, sizes_of_parent
from tests.models import FAMILIES, load_with_transformers, save_checkpoint
from tests.smaller import random_plan

pytestmark = pytest.mark.fast

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parent]:
    root = tmp_path_factory.mktemp("parents")
    changes = {"qwen3": HEADS}
    found = {
        family: Parent.of(save_checkpoint(root / family, family, **changes.get(family, {}))) for family in FAMILIES
    }
    found["each head its own"] = Parent.of(save_checkpoint(root / "own", "qwen2", num_key_value_heads=4))
    return found


def sizes(parent: Parent, **wanted: Any) -> dict[str, int]:
    """Return the sizes that differ from the parent's."""
    request = parse_request({"multiple_of": 8, **wanted})
    found = resolve_sizes(request, parent.config, parent.bytes_per_value)
    return {target: size for target, size in found.items() if size != sizes_of_parent(parent.config)[target]}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"ffn": "75%"}, {"ffn": 72}),
        ({"ffn": "70%"}, {"ffn": 64}),  # 67.2, nearer to 64 than to 72
        ({"ffn": "1%"}, {"ffn": 8}),
        ({"ffn": "99%"}, {}),
        ({"ffn": 40}, {"ffn": 40}),
        ({"ffn": "75%", "tensor_parallel": 3}, {"ffn": 72}),
        ({"layers": "60%"}, {"layers": 2}),
        ({"layers": 1}, {"layers": 1}),
        ({"kv_heads": 2}, {"kv_heads": 2, "attention_heads": 4}),
        ({"kv_heads": 2, "attention_heads": 2}, {"kv_heads": 2, "attention_heads": 2}),
        ({"attention_heads": "50%"}, {"attention_heads": 4}),
        ({"hidden_size": "90%"}, {"hidden_size": 56}),
    ],
)
def test_sizes_follow_the_rules(wanted: dict[str, Any], expected: dict[str, int], parents: dict[str, Parent]) -> None:
    if "tensor_parallel" in wanted:
        wanted = {**wanted, "kv_heads": 3}
        expected = {**expected, "kv_heads": 3, "attention_heads": 6}
    assert sizes(parents["qwen3"], **wanted) == expected


def test_heads_with_keys_of_their_own_go_together(parents: dict[str, Parent]) -> None:
    parent = parents["each head its own"]
    for target in ("attention_heads", "kv_heads"):
        assert sizes(parent, **{target: 3}) == {"attention_heads": 3, "kv_heads": 3}
    with pytest.raises(PlanError, match="give one of them"):
        sizes(parent, attention_heads=3, kv_heads=2)


def test_experts_stay_as_many_as_a_token_goes_to(parents: dict[str, Parent]) -> None:
    assert sizes(parents["qwen3_moe"], experts="10%") == {"experts": 3}
    assert sizes(parents["qwen3_moe"], experts="50%", expert_parallel=2) == {"experts": 4}
    with pytest.raises(PlanError, match="each token goes to 3; near it: 3"):
        sizes(parents["qwen3_moe"], experts=2)
    with pytest.raises(PlanError, match="experts: no size up to 8 will do: expert_parallel=16 must divide it"):
        sizes(parents["qwen3_moe"], layers=2, expert_parallel=16)


def test_a_llama_keeps_a_hidden_size_that_its_heads_divide(parents: dict[str, Parent]) -> None:
    assert sizes(parents["llama"], hidden_size="60%", multiple_of=1) == {"hidden_size": 40}
    with pytest.raises(
        PlanError, match="of the 4 attention heads, as transformers asks of this family; near it: 36 or 40"
    ):
        sizes(parents["llama"], hidden_size=38, multiple_of=1)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (
            {"ffn": 50},
            "ffn=50: it must be a multiple of 8 (multiple_of.ffn)",
        ),
        ({"ffn": 104}, "ffn=104: the model has 96"),
        ({"kv_heads": 3, "tensor_parallel": 2}, "kv_heads=3: tensor_parallel=2 must divide it, or be a multiple of it"),
        ({"attention_heads": 6}, "each of the 4 KV heads must have the same number of them"),
        ({"experts": 2}, "experts: the model has none"),
        ({"shared_expert_ffn": 8}, "shared_expert_ffn: the model has none"),
        ({"params": "80%", "axes": "experts"}, "experts: the model has none"),
        ({"layers": 2, "tensor_parallel": 5}, "tensor_parallel=5 divides; near it: 80"),
        (
            {"attention_heads": 4, "tensor_parallel": 3},
            "kv_heads=4: tensor_parallel=3 must divide it",
        ),
    ],
)
def test_sizes_against_the_rules_are_refused(wanted: dict[str, Any], text: str, parents: dict[str, Parent]) -> None:
    with pytest.raises(PlanError) as caught:
        sizes(parents["qwen3"], **wanted)
    assert text in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", ["params", "active_params", "memory"])
def test_a_budget_is_met_with_the_most_that_the_rules_allow(
    family: str, budget: str, parents: dict[str, Parent]
) -> None:
    parent = parents[family]
    axis = "expert_ffn" if "mo" in family or family == "mixtral" else "ffn"
    size = {
        "params": parent.size.parameters,
        "active_params": parent.size.active_parameters,
        "memory": parent.size.bytes,
    }
    cache = parent.size.kv_cache_bytes_per_token * 3 * 100 if budget == "memory" else 0
    most = 0.9 * size[budget] + cache
    wanted = {budget: str(int(most)), "axes": axis, "batch": 3, "length": 100, "multiple_of": 4}
    found = sizes(parent, **wanted)
    assert set(found) == {axis}

    def cost(width: int) -> float:
        after = random_plan(parent.folder, **{axis: width}, multiple_of=4).after
        costs = {"params": after.parameters, "active_params": after.active_parameters, "memory": after.bytes}
        return costs[budget] + cache

    assert cost(found[axis]) <= most < cost(found[axis] + 4)


def test_a_budget_that_an_axis_cannot_meet_names_what_it_can(parents: dict[str, Parent]) -> None:
    with pytest.raises(PlanError, match="can't be met by ffn alone: at their smallest the model still has"):
        sizes(parents["qwen3"], params="20000")
    several = sizes(parents["qwen3"], params="40000", axes="ffn,hidden_size,layers")
    assert set(several) == {"ffn", "hidden_size", "layers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_has_them(family: str, parents: dict[str, Parent]) -> None:
    parent = parents[family]
    model = load_with_transformers(parent.folder, torch.float32)
    assert parent.size.parameters == sum(weight.numel() for weight in model.parameters())
    assert parent.size.bytes == 4 * parent.size.parameters
    config = model.config
    per_layer = 2 * config.num_key_value_heads * parent.config.head_dim * 4
    assert parent.size.kv_cache_bytes_per_token == config.num_hidden_layers * per_layer


def test_of_experts_a_token_meets_some(parents: dict[str, Parent]) -> None:
    size, config = parents["mixtral"].size, parents["mixtral"].config.architecture
    assert config.experts is not None
    one_expert = 3 * config.hidden_size * config.experts.ffn_size
    assert size.parameters - size.active_parameters == config.num_layers * 2 * one_expert  # 2 of 4
