"""Inventories of modules: what has channels, heads or experts, and is accounted for by nobody."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megascore.sites.inventory import grouped, is_norm, norm_width, unaccounted

pytestmark = pytest.mark.fast


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.temperature = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(3, 3)


def make_layer() -> nn.ModuleDict:
    return nn.ModuleDict({"mixer": Mixer(), "proj": nn.Linear(2, 2), "act": nn.ReLU(), "q_norm": nn.Identity()})


def test_what_is_wholly_unknown_comes_as_one() -> None:
    assert unaccounted(make_layer(), {"proj"}) == [("mixer", "Mixer")]
    assert unaccounted(make_layer(), {"not there"}) == [("", "ModuleDict")]


def test_beside_something_known_each_part_is_named() -> None:
    assert unaccounted(make_layer(), {"proj", "mixer.inner"}) == [("mixer.scale", "parameter [3]")]
    assert unaccounted(make_layer(), {"proj", "mixer.scale"}) == [("mixer.inner", "Linear")]
    assert unaccounted(make_layer(), {"proj", "mixer"}) == []


def test_a_module_under_a_second_name_is_accounted_for_by_the_first() -> None:
    layer = make_layer()
    layer["again"] = nn.ModuleList([layer["proj"], nn.Linear(1, 1)])
    assert unaccounted(layer, {"proj", "mixer"}) == [("again.1", "Linear")]


def test_weights_tied_to_those_of_something_known_do_not_make_a_module_known() -> None:
    layer = make_layer()
    layer["mixer"].inner.weight = layer["proj"].weight
    assert unaccounted(layer, {"proj"}) == [("mixer", "Mixer")]


def test_norms_are_known_without_weights_too() -> None:
    bare = nn.RMSNorm(4, elementwise_affine=False)
    assert is_norm("post", bare)
    assert norm_width(bare) == 4
    assert unaccounted(nn.ModuleDict({"a": nn.Linear(1, 1), "b": bare}), {"a"}) == [("b", "RMSNorm")]
    assert not is_norm("q_norm", nn.Identity())
    assert not is_norm("norm_proj", nn.Linear(4, 4))


def test_layers_that_lack_the_same_come_as_one_line() -> None:
    names = [f"decoder.layers.{number}.mlp: Mixer" for number in (0, 1, 1, 7)]
    assert grouped([*names, "decoder.layers.2.mlp.norm: Norm", "tower.layers: ModuleList"]) == [
        "decoder.layers.*.mlp: Mixer (3 layers)",
        "decoder.layers.2.mlp.norm: Norm",
        "tower.layers: ModuleList",
    ]
