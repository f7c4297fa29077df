"""Experts of Transformer Engine's layers: TEGroupedMLP and SequentialMLP of its linear layers, and shared experts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.engine.layers import on_megatrons_own_layers
from tests.mcore.expert_model import Variant
from tests.mcore.sites import test_experts, test_masks
from tests.mcore.sites.test_experts import TP_SP, Layouts, check_tokens, check_values
from tests.pool import WorkerPool

TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""

GROUPED, SEQUENTIAL = Variant("alltoall", "engine_grouped"), Variant("alltoall", "engine_sequential")
LAYOUTS: dict[int, Layouts] = {
    1: {"grouped": ({}, GROUPED), "sequential": ({}, SEQUENTIAL)},
    2: {
        "EP=2, grouped": ({"expert": 2}, GROUPED),
        "EP=2, sequential": ({"expert": 2}, SEQUENTIAL),
        "TP=2, grouped, each token on both ranks": ({"tensor": 2}, Variant("allgather", "engine_grouped")),
        "PP=2, sequential": ({"pipeline": 2}, SEQUENTIAL),
    },
    4: {
        "TP=2 SP, EP=2, ETP=2, grouped": ({**TP_SP, "expert": 2, "expert_tensor": 2}, GROUPED),
        "TP=2 SP, EP=2, shared experts overlapped": (
            {**TP_SP, "expert": 2},
            Variant("alltoall", "engine_grouped", overlap=True),
        ),
    },
}


@pytest.fixture(scope="module")
def expected(engine: WorkerPool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and tokens per expert, by formulas on the activations of Megatron's own layers."""
    return engine.run(1, on_megatrons_own_layers, test_experts.compute_expected)[0]


@pytest.fixture(scope="module")
def expected_of_documents(engine: WorkerPool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return engine.run(1, on_megatrons_own_layers, test_masks.compute_expected_of_experts)[0]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_experts_score_as_the_oracle_says(
    world_size: int, engine: WorkerPool, expected: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    for by_layout in engine.run(world_size, test_experts.score_on, LAYOUTS[world_size]):
        for layout, (values, metadata, unseen) in by_layout.items():
            check_values(layout, values, unseen, expected[0], TOLERANCE)
            check_tokens(layout, metadata, expected[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_never_counts_for_experts(
    world_size: int, engine: WorkerPool, expected_of_documents: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    wanted, tokens = expected_of_documents
    for by_layout in engine.run(world_size, test_masks.score_experts, LAYOUTS[world_size]):
        for layout, (values, metadata, unseen) in by_layout.items():
            check_values(layout, values, unseen, wanted, TOLERANCE)
            for key in (key for key in tokens if key.endswith("/experts/router_weighted_norm")):
                assert metadata["sites"][key]["tokens_per_expert"] == tokens[key].tolist(), f"{key} on {layout}"


def test_the_experts_are_transformer_engines(engine: WorkerPool) -> None:
    assert engine.run(1, classes_of_experts, GROUPED)[0] >= {"TEGroupedMLP", "TEColumnParallelGroupedLinear"}
    sequential: set[Any] = engine.run(1, classes_of_experts, SEQUENTIAL)[0]
    assert sequential >= {"SequentialMLP", "TEColumnParallelLinear", "TERowParallelLinear"}
    assert "RowParallelLinear" not in sequential


def classes_of_experts(variant: Variant) -> set[str]:
    from megascore.config import ParallelConfig
    from tests.mcore.expert_model import build_expert_model
    from tests.mcore.logits import CPU, TIMEOUT, parallel_world

    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        (model,) = build_expert_model(ParallelConfig(), variant)
        return {type(module).__name__ for module in model.decoder.layers[1].mlp.modules()}
