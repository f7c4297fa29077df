"""Layouts that fit a model, and layouts that do not. Tier: pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megascore.config import ParallelConfig
from megascore.errors import LayoutError
from megascore.mcore.models.layout import check_divisible, check_sequence_length, exchanges_tokens, layers_of_chunks
from megascore.weights.architecture import Architecture, Experts

SMOLLM2 = Architecture(
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    ffn_size=1536,
    vocab_size=49152,
    max_positions=8192,
)


@pytest.mark.parametrize(
    ("change", "tensor", "message"),
    [
        ({}, 2, r"tensor=2 does not divide the model's 9 attention heads and 3 KV heads; .* would do: 1, 3\.$"),
        ({"num_heads": 8, "num_kv_heads": 2}, 4, r"the model's 2 KV heads; tensor sizes that would do: 1, 2\.$"),
        ({"num_heads": 8, "num_kv_heads": 4, "ffn_size": 1538}, 4, r"1538 FFN channels; .* would do: 1, 2\.$"),
    ],
)
def test_sizes_that_do_not_split_are_named_with_those_that_would_do(
    change: dict[str, int], tensor: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_divisible(replace(SMOLLM2, **change), ParallelConfig(tensor=tensor))  # type: ignore[arg-type]


def test_a_layout_that_fits_passes() -> None:
    check_divisible(SMOLLM2, ParallelConfig(tensor=3, sequence=True, pipeline=2))


def test_a_vocabulary_need_not_divide() -> None:
    check_divisible(replace(SMOLLM2, vocab_size=49153), ParallelConfig(tensor=3))


def test_experts_are_split_by_the_axes_of_experts() -> None:
    experts = Experts(num_experts=6, ffn_size=9, layers=(True,) * 30)
    model = replace(SMOLLM2, ffn_size=1537, experts=experts)
    check_divisible(model, ParallelConfig(tensor=3, expert=2, expert_tensor=3))
    with pytest.raises(LayoutError, match=r"expert=4 does not divide the model's 6 experts; .* would do: 1, 2, 3, 6"):
        check_divisible(model, ParallelConfig(expert=4))
    with pytest.raises(LayoutError, match=r"expert_tensor=2 does not divide the model's 9 channels of each expert"):
        check_divisible(model, ParallelConfig(expert_tensor=2))


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(), False),
        (ParallelConfig(tensor=4, pipeline=2), False),
        (ParallelConfig(expert=2), True),
        (ParallelConfig(expert_tensor=2), True),
        (ParallelConfig(tensor=4, expert=2, expert_tensor=2), False),
        (ParallelConfig(tensor=2, context=2, expert=4), False),
        (ParallelConfig(tensor=2, expert=2, expert_tensor=2), True),
        # Experts of ranks (0, 1), (2, 3), (4, 5); dense layers of ranks (0, 1, 2), (3, 4, 5).
        (ParallelConfig(tensor=3, expert=2), True),
    ],
)
def test_experts_that_lie_inside_one_copy_of_the_dense_layers_exchange_no_tokens(
    parallel: ParallelConfig, expected: bool
) -> None:
    assert exchanges_tokens(parallel) is expected


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.expert=2.*has no experts"):
        check_divisible(SMOLLM2, ParallelConfig(expert=2))


@pytest.mark.parametrize(
    ("num_layers", "parallel", "expected"),
    [
        (30, ParallelConfig(pipeline=2), [[15], [15]]),
        (4, ParallelConfig(pipeline=2, pipeline_layers=[3, 1]), [[3], [1]]),
        (8, ParallelConfig(pipeline=2, virtual_pipeline=2), [[2, 2], [2, 2]]),
        (8, ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layers=[5, 3]), [[3, 2], [2, 1]]),
    ],
)
def test_layers_are_dealt_to_chunks(num_layers: int, parallel: ParallelConfig, expected: list[list[int]]) -> None:
    assert layers_of_chunks(num_layers, parallel) == expected


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(pipeline=4), r"30 layers do not split evenly.*would do: 1, 2, 3, 5, 6, 10, 15, 30"),
        (ParallelConfig(pipeline=2, virtual_pipeline=4), r"would do: none; or give .* parallel\.pipeline_layers"),
        (ParallelConfig(pipeline=2, pipeline_layers=[16, 15]), r"sums to 31: expected 30"),
        (ParallelConfig(pipeline=2, pipeline_layers=[30, 0]), r"with at least 1 for each stage"),
    ],
)
def test_layers_that_do_not_split_are_an_error(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layers_of_chunks(30, parallel)


def test_sequence_parallelism_splits_the_sequence() -> None:
    check_sequence_length(256, ParallelConfig(tensor=3))
    check_sequence_length(255, ParallelConfig(tensor=3, sequence=True))
    with pytest.raises(LayoutError, match=r"sequence_length=256 .*a multiple of 3, such as 255 or 258"):
        check_sequence_length(256, ParallelConfig(tensor=3, sequence=True))
    with pytest.raises(LayoutError, match=r"a multiple of 8, such as 8\."):
        check_sequence_length(6, ParallelConfig(tensor=2, sequence=True, context=2))
