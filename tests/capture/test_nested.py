"""`nested_move_to`: containers are rebuilt, what is shared stays shared, the rest is left alone. Pure.

Tensors go to the meta device, which every machine has.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import FrozenInstanceError, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from megascore.capture import nested_move_to


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    tensor: Tensor
    derived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.tensor + 1)


@dataclass
class Counting:
    tensor: Tensor
    made = 0

    def __post_init__(self) -> None:
        type(self).made += 1


@dataclass(frozen=True, slots=True)
class Slotted:
    tensor: Tensor
    name: str


class Named(dict):  # type: ignore[type-arg]
    """A dict with a constructor of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def tensor() -> Tensor:
    return torch.arange(3.0)


def is_moved(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.shape == (3,)


@pytest.mark.parametrize(
    ("value", "reach"),
    [
        (tensor(), lambda v: v),
        ([1, tensor()], lambda v: v[1]),
        ((tensor(), None), lambda v: v[0]),
        (Pair("x", tensor()), lambda v: v.second),
        ({"a": {"b": [tensor()]}}, lambda v: v["a"]["b"][0]),
        (OrderedDict(a=tensor()), lambda v: v["a"]),
        (defaultdict(list, a=tensor()), lambda v: v["a"]),
        (UserDict(a=tensor()), lambda v: v["a"]),
        (MappingProxyType({"a": tensor()}), lambda v: v["a"]),
        (Frozen(tensor()), lambda v: v.derived),
        (Slotted(tensor(), "x"), lambda v: v.tensor),
        (torch.max(torch.eye(3), 0), lambda v: v.values),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_move_and_containers_keep_their_type(value: Any, reach: Any) -> None:
    moved = nested_move_to(value, "meta")
    assert type(moved) is type(value)
    assert is_moved(reach(moved))
    assert not reach(value).is_meta


def test_a_dict_subclass_keeps_what_it_has_beside_its_entries() -> None:
    named = Named("mine")
    named["a"] = tensor()
    moved = nested_move_to(named, "meta")
    assert moved.name == "mine"
    assert is_moved(moved["a"])
    grouped = nested_move_to(defaultdict(list, a=tensor()), "meta")
    assert grouped["new"] == []


def test_dataclasses_are_copied_without_their_constructor() -> None:
    value = Counting(tensor())
    made = Counting.made
    moved = nested_move_to(value, "meta")
    assert is_moved(moved.tensor)
    assert not value.tensor.is_meta
    assert Counting.made == made
    with pytest.raises(FrozenInstanceError):
        nested_move_to(Frozen(tensor()), "meta").tensor = 1  # type: ignore[misc]


def test_a_model_output_moves_as_mapping_and_as_dataclass() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    value = BaseModelOutput(last_hidden_state=tensor(), hidden_states=(tensor(), tensor()))
    moved = nested_move_to(value, "meta")
    assert isinstance(moved, BaseModelOutput)
    assert is_moved(moved.last_hidden_state)
    assert moved["last_hidden_state"] is moved.last_hidden_state is moved[0]
    assert is_moved(moved.hidden_states[1])
    assert not value[0].is_meta


def test_what_was_shared_is_shared() -> None:
    shared, inner = tensor(), [tensor()]
    moved = nested_move_to({"a": shared, "b": (shared, inner), "c": inner}, "meta")
    assert moved["a"] is moved["b"][0]
    assert moved["c"] is moved["b"][1]
    assert moved["c"] is not inner


def test_containers_that_hold_themselves_are_walked_once() -> None:
    loop: list[Any] = [tensor()]
    loop.append(loop)
    moved = nested_move_to(loop, "meta")
    assert moved[1] is moved
    through_tuple: tuple[Any, ...] = ([tensor()],)
    through_tuple[0].append(through_tuple)
    moved_tuple = nested_move_to(through_tuple, "meta")
    assert is_moved(moved_tuple[0][1][0][0])


def test_everything_else_is_left_alone() -> None:
    from transformers import DynamicCache

    others = [
        1,
        2.5,
        "text",
        None,
        torch.float32,
        nn.Linear(1, 1),
        {tensor()},
        object(),
        Frozen,
        DynamicCache(),
        slice(3),
    ]
    moved = nested_move_to(others, "meta")
    assert all(new is old for new, old in zip(moved, others, strict=True))
    assert not others[5].weight.is_meta  # type: ignore[attr-defined]


def test_lists_are_new_also_where_nothing_moves_and_tuples_are_not() -> None:
    tensors = [tensor()]
    there = nested_move_to((tensors, 1), "cpu")
    assert there[0] is not tensors
    assert there[0][0] is tensors[0]
    pair = Pair(1, torch.Size([2]))
    assert nested_move_to(pair, "meta") is pair
