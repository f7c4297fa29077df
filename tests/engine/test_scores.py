"""Scores of models of Transformer Engine's layers, on every layout: those that Megatron's own layers must have.

Context parallelism is met in float32 only, where megascore puts an attention of its own between Transformer Engine's
layers: Transformer Engine's own needs CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.config import ParallelConfig
from tests.engine.layers import on_megatrons_own_layers
from tests.mcore.oracle import ITERATIVE, all_scores, moment_scores
from tests.mcore.order import assert_same_order, spearman
from tests.mcore.sites import test_masks, test_other_models, test_scores_on_every_layout
from tests.models import save_checkpoint
from tests.pool import WorkerPool

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""float64: only the order of additions differs. float32: the model's own sums differ as well."""
TP_SP: dict[str, Any] = {"tensor": 2, "sequence": True}

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "biases and fused norms": ("llama", {}),
    "norms of queries and keys": ("qwen3", {"head_dim": 16}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one process": (1, {}, "float64"),
    "one process, float32": (1, {}, "float32"),
    "TP=2": (2, {"tensor": 2}, "float64"),
    "TP=2 with sequence parallel": (2, TP_SP, "float64"),
    "TP=2 with sequence parallel, float32": (2, TP_SP, "float32"),
    "CP=2, float32": (2, {"context": 2}, "float32"),
    "PP=2 uneven": (2, {"pipeline": 2, "pipeline_layers": [1, 3]}, "float64"),
    "PP=2 x VPP=2": (2, {"pipeline": 2, "virtual_pipeline": 2}, "float64"),
    "DP=2": (2, {}, "float64"),
    "TP=2 x PP=2": (4, {**TP_SP, "pipeline": 2}, "float64"),
    "TP=2 x CP=2, float32": (4, {**TP_SP, "context": 2}, "float32"),
}
MASKED = {
    "one process": (1, {}),
    "TP=2 with sequence parallel": (2, TP_SP),
    "PP=2 x VPP=2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP=2": (2, {}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(save_checkpoint(folder / family, family, **sizes)) for name, (family, sizes) in MODELS.items()}


@pytest.fixture(scope="module")
def expected(engine: WorkerPool, checkpoints: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """By formulas on the activations of Megatron's own layers."""
    compute = test_scores_on_every_layout.compute_expected
    return {
        name: engine.run(1, on_megatrons_own_layers, compute, checkpoints[name], sizes)[0]
        for name, (_, sizes) in MODELS.items()
    }


def assert_scores(scores: dict[str, Tensor], expected: dict[str, Tensor], dtype: str, where: str) -> None:
    assert scores.keys() == expected.keys(), where
    for key, value in scores.items():
        message = f"{key} on {where}"
        if key.endswith(ITERATIVE) and dtype == "float32":
            # Ranks, not sums: channels whose contributions rounding can't tell apart may change places.
            assert spearman(value, expected[key]) > 0.999, message
            continue
        torch.testing.assert_close(value, expected[key], rtol=TOLERANCE[dtype], atol=0, msg=message)
        assert_same_order(value, expected[key], TOLERANCE[dtype], message)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_megatrons_own_layers_on(
    layout: str, engine: WorkerPool, checkpoints: dict[str, str], expected: dict[str, dict[str, Tensor]]
) -> None:
    world_size, degrees, dtype = LAYOUTS[layout]
    scores = all_scores(test_scores_on_every_layout.NUM_STEPS) + moment_scores()
    for model, wanted in expected.items():
        ranks = engine.run(
            world_size,
            test_scores_on_every_layout.score,
            checkpoints[model],
            ParallelConfig(**degrees),
            dtype,
            scores,
        )
        for found in ranks:
            assert_scores(found, wanted, dtype, f"{layout}, {model}")


@pytest.mark.parametrize("model", MODELS)
def test_activations_inside_fused_norms_are_those_of_norms_before_linear_layers(
    model: str, engine: WorkerPool, checkpoints: dict[str, str], expected: dict[str, dict[str, Tensor]]
) -> None:
    compute = test_scores_on_every_layout.compute_expected
    assert_scores(engine.run(1, compute, checkpoints[model], MODELS[model][1])[0], expected[model], "float64", model)


def test_a_model_is_made_of_transformer_engines_layers(engine: WorkerPool, checkpoints: dict[str, str]) -> None:
    classes = engine.run(1, classes_of_a_layer, checkpoints["norms of queries and keys"])[0]
    assert {
        "TELayerNormColumnParallelLinear",
        "TERowParallelLinear",
        "TEDotProductAttention",
        "UnfusedDotProductAttention",
        "RMSNorm",
    } <= classes
    assert not classes & {"ColumnParallelLinear", "RowParallelLinear", "DotProductAttention"}


def classes_of_a_layer(checkpoint: str) -> set[str]:
    from megascore.config import ModelConfig
    from megascore.mcore.models.build import load_model
    from tests.mcore.logits import CPU, TIMEOUT, parallel_world

    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), ParallelConfig(), CPU, 16)
        modules: list[nn.Module] = list(chunks[0].decoder.layers[0].modules())
        return {type(module).__name__ for module in modules if "apex" not in type(module).__module__}


@pytest.fixture(scope="module")
def expected_of_documents(engine: WorkerPool, checkpoints: dict[str, str]) -> tuple[dict[str, Tensor], float]:
    checkpoint = checkpoints["biases and fused norms"]
    return engine.run(1, on_megatrons_own_layers, test_masks.compute_expected, checkpoint)[0]


@pytest.mark.parametrize("layout", MASKED)
def test_a_padded_batch_scores_as_its_documents_alone_on(
    layout: str,
    engine: WorkerPool,
    checkpoints: dict[str, str],
    expected_of_documents: tuple[dict[str, Tensor], float],
) -> None:
    world_size, degrees = MASKED[layout]
    wanted, wanted_loss = expected_of_documents
    arguments = checkpoints["biases and fused norms"], ParallelConfig(**degrees), test_masks.make_masks()
    ranks = engine.run(world_size, test_masks.score, *arguments)
    for scores, metadata, _ in ranks:
        assert_scores(scores, wanted, "float64", layout)
        assert metadata["num_tokens"] == sum(test_masks.LENGTHS)
    nats, num_tokens = (sum(rank[2][part] for rank in ranks) for part in range(2))
    assert nats / num_tokens == pytest.approx(wanted_loss, rel=TOLERANCE["float64"])


@pytest.mark.parametrize("zero_centered", [False, True], ids=["gamma", "gamma without the one"])
def test_layer_norms_and_their_biases_score_as_the_oracle_says(zero_centered: bool, engine: WorkerPool) -> None:
    expected = engine.run(1, on_megatrons_own_layers, test_other_models.compute_expected)[0]
    for world_size, degrees in ((1, {}), (2, {"tensor": 2}), (2, TP_SP)):
        parallel = ParallelConfig(**degrees)
        for scores in engine.run(world_size, test_other_models.score, parallel, zero_centered):
            assert_scores(scores, expected, "float64", f"{degrees}")


def test_a_kernel_that_the_shim_has_not_raises_by_name(engine: WorkerPool) -> None:
    assert "transformer_engine_torch.fused_attn_fwd is not in" in engine.run(1, call_a_missing_kernel)[0]


def call_a_missing_kernel() -> str:
    import transformer_engine_torch

    with pytest.raises(NotImplementedError) as caught:
        transformer_engine_torch.fused_attn_fwd()
    return str(caught.value)


def test_nothing_of_transformer_engine_is_on_the_path_of_other_processes(
    engine: WorkerPool, engine_folder: Path
) -> None:
    import importlib.util
    import sys

    found = engine.run(1, file_of_the_engine)[0]
    assert found.startswith(str(engine_folder))
    assert str(engine_folder) not in sys.path
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is None or not str(spec.origin).startswith(str(engine_folder))


def file_of_the_engine() -> str:
    import transformer_engine

    return str(transformer_engine.__file__)
