"""What the published scores cost a GPU, by count on the meta device: each activation is read about once."""

from __future__ import annotations

import pytest

from megascore.sites.requests import recipe
from tests.benchmarks.gpu_traffic import GPUS, SHAPES, cost_of_layer

MOST_RATIO = {"8B": 1.04, "70B": 1.02}
"""A scored pass over a plain one; reading each activation once alone comes to 1.036 and 1.0195 on an H100."""


@pytest.mark.parametrize("name", SHAPES)
def test_minitron_reads_each_activation_about_once_in_few_kernels(name: str) -> None:
    shape = SHAPES[name]
    cost = cost_of_layer(shape, recipe("minitron"))
    assert cost.read + cost.written <= 1.1 * shape.bytes_once
    assert cost.launches <= 40
    assert max(cost.ratio(shape, gpu) for gpu in GPUS) <= MOST_RATIO[name]
