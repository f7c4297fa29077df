"""What a plan is asked for: every key, and what is none."""

from __future__ import annotations

from typing import Any

import pytest

from megascore.errors import PlanError
from megascore.plans.ranges import parse_ranges, ranges_text
from megascore.plans.request import PlanRequest, parse_request

pytestmark = pytest.mark.fast


def test_texts_and_values_of_python_ask_for_the_same() -> None:
    typed = parse_request(
        {"ffn": "75%", "layers": "24", "multiple_of": "32", "per_layer": "true", "tensor_parallel": "2"}
    )
    python = parse_request({"ffn": 0.75, "layers": 24, "multiple_of": 32, "per_layer": True, "tensor_parallel": 2})
    assert typed == python
    assert typed.widths == {"layers": 24, "ffn": 0.75}
    assert set(typed.multiples.values()) == {32}


@pytest.mark.parametrize(
    ("text", "amount"),
    [("6e9", 6e9), ("6B", 6e9), ("500M", 5e8), ("7000000000", 7e9), ("80%", 0.8), (6_000_000_000, 6e9)],
)
def test_budgets_of_parameters(text: Any, amount: float) -> None:
    assert parse_request({"params": text}).budget == ("params", pytest.approx(amount))


@pytest.mark.parametrize(("text", "amount"), [("40GiB", 40 * 2**30), ("40 GB", 4e10), ("1.5gib", 1.5 * 2**30)])
def test_budgets_of_memory(text: str, amount: float) -> None:
    assert parse_request({"memory": text}).budget == ("memory", amount)


def test_one_target_can_have_a_multiple_of_its_own() -> None:
    request = parse_request({"ffn": 96, "multiple_of": 8, "multiple_of.hidden_size": 9})
    assert request.multiples == {"hidden_size": 9, "ffn": 8, "expert_ffn": 8, "shared_expert_ffn": 8}


def test_axes_are_a_list_or_a_text() -> None:
    for axes in ("ffn,layers", "[ffn, layers]", ["ffn", "layers"]):
        assert parse_request({"params": "80%", "axes": axes}).axes == ("ffn", "layers")


def test_all_of_it_is_a_part_of_it() -> None:
    assert parse_request({"ffn": "100%"}) == PlanRequest(widths={"ffn": 1.0})


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ({}, "nothing says how small"),
        ({"multiple_of": "64"}, "nothing says how small"),
        ({"fnn": "75%"}, "a plan has no key 'fnn': expected ffn"),
        ({"method.fnn": "l2_norm", "ffn": 8}, "a plan has no key 'method.fnn': expected method.ffn"),
        ({"multiple_of.layers": "8", "ffn": 8}, "no key 'multiple_of.layers'"),
        ({"ffn": "0%"}, "ffn=0%: expected more than 0 %"),
        ({"ffn": "120%"}, "ffn=120%"),
        ({"ffn": "many"}, "ffn=many: expected a whole number of units, or a part such as 75%"),
        ({"ffn": "-3"}, "ffn=-3"),
        ({"ffn": True}, "ffn=True"),
        ({"ffn": 0}, "ffn=0"),
        ({"ffn": 1.5}, "ffn=1.5"),
        ({"params": "6e9", "memory": "1GiB"}, "params and memory are given"),
        ({"params": "much"}, "params=much: expected a number such as 6e9, or a part such as 80%"),
        ({"params": "100%"}, "params=100%: expected more than 0 % and less than 100 %"),
        ({"params": "0.5"}, "params=0.5: expected a number"),
        ({"params": "1e99"}, "params=1e99"),
        ({"memory": "40 gallons"}, "memory=40 gallons: expected a number such as 40GiB"),
        ({"axes": "ffn", "ffn": "50%"}, "axes says what a budget cuts"),
        ({"axes": "fnn", "params": "6e9"}, "axes has 'fnn'"),
        ({"axes": "ffn", "ffn": 8, "params": "6e9"}, "axes has 'ffn', whose size is given too"),
        ({"axes": "", "params": "6e9"}, "axes is empty"),
        ({"ffn": 8, "multiple_of": "0"}, "multiple_of=0: expected a whole number of at least 1"),
        ({"ffn": 8, "tensor_parallel": "two"}, "tensor_parallel=two"),
        ({"ffn": 8, "per_layer": "maybe"}, "per_layer=maybe: expected true or false"),
    ],
)
def test_what_is_no_request_is_told(pairs: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_request(pairs)
    assert text in str(caught.value)


@pytest.mark.parametrize("numbers", [(), (3,), (0, 1, 2, 5, 7, 8), (5, 4, 0, 1), tuple(range(1000))])
def test_ranges_come_back(numbers: tuple[int, ...]) -> None:
    assert parse_ranges(ranges_text(numbers), "kept") == numbers


@pytest.mark.parametrize("text", ["a", "1-", "3-1", "-1", "1;2", "1,,2", "1-99999999999", None, [1, 2], 1.5, True])
def test_what_are_no_ranges_is_told(text: object) -> None:
    with pytest.raises(PlanError, match="kept"):
        parse_ranges(text, "kept")
