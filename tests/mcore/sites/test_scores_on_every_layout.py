"""The same scores on every layout: real Megatron-Core modules on gloo processes against a float64 oracle."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from tests.mcore.oracle import (
    ITERATIVE,
    Recorder,
    all_scores,
    expected_contributions,
    expected_moments,
    expected_scores,
    moment_scores,
)
from tests.mcore.order import assert_same_order, spearman
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

NUM_SAMPLES, SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 7, 16, 4, 2
"""7 samples in steps of 4: the last step is short, and gives two data-parallel ranks different numbers of samples."""

NUM_STEPS = 2

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""float64: only the order of additions differs between layouts. float32: the model's own sums differ as well."""

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "GQA": ("llama", {}),
    "MHA": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 8}),
}
"""Family and sizes other than `SIZES`; the families' biases and tied embeddings come along."""

LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("GQA", 1, {}),
    "TP=2": ("GQA", 2, {"tensor": 2}),
    "TP=2 with sequence parallel": ("GQA", 2, {"tensor": 2, "sequence": True}),
    "CP=2": ("GQA", 2, {"context": 2}),
    "PP=2": ("GQA", 2, {"pipeline": 2}),
    "PP=2 uneven": ("GQA", 2, {"pipeline": 2, "pipeline_layers": [1, 3]}),
    "PP=2 x VPP=2": ("GQA", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP=2": ("GQA", 2, {}),
    "TP=4": ("MHA", 4, {"tensor": 4}),
    "TP=2 x PP=2": ("GQA", 4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "TP=2 x DP=2": ("GQA", 4, {"tensor": 2}),
    "TP=2 x CP=2": ("GQA", 4, {"tensor": 2, "sequence": True, "context": 2}),
    "TP=8 with sequence parallel": ("MHA", 8, {"tensor": 8, "sequence": True}),
    "TP=2 x CP=2 x DP=2": ("GQA", 8, {"tensor": 2, "context": 2}),
    "TP=2 x PP=2 x DP=2": ("GQA", 8, {"tensor": 2, "sequence": True, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_checkpoint(folder / name, family, **sizes) for name, (family, sizes) in MODELS.items()}


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoints: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return {name: world.run(1, compute_expected, str(checkpoints[name]), MODELS[name][1])[0] for name in MODELS}


FAST = "TP=2 with sequence parallel"
"""The layout that the fast tier runs: channels are split at some sites, sequences at others."""


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.fast) if name == FAST else name for name in LAYOUTS]
)
def test_scores_equal_the_oracle_on(
    layout: str, world: WorkerPool, checkpoints: dict[str, Path], expected: dict[str, dict[str, Tensor]]
) -> None:
    model, world_size, degrees = LAYOUTS[layout]
    ranks = world.run(world_size, score_in_all_dtypes, str(checkpoints[model]), ParallelConfig(**degrees))
    for rank, by_dtype in enumerate(ranks):
        for dtype, scores in by_dtype.items():
            assert scores.keys() == expected[model].keys()
            for key, score in scores.items():
                message = f"{key} in {dtype} on rank {rank}"
                wanted = expected[model][key]
                if key.endswith(ITERATIVE) and dtype == "float32":
                    # Ranks, not sums: channels whose contributions rounding can't tell apart may change places.
                    assert spearman(score, wanted) > 0.999, message
                    continue
                torch.testing.assert_close(score, wanted, rtol=TOLERANCE[dtype], atol=0, msg=message)
                assert_same_order(score, wanted, TOLERANCE[dtype], message)


def compute_expected(checkpoint: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    device = torch.device("cpu")
    with parallel_world(ParallelConfig(), device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), ParallelConfig(), device, SEQUENCE_LENGTH)
        recorder = Recorder(chunks[0])
        forward_only(chunks, [sample[None] for sample in make_tokens()], compute_loss=False)
        sizes = {**SIZES, **sizes}
        head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
        num_layers, num_kv_heads = sizes["num_hidden_layers"], sizes["num_key_value_heads"]
        samples = list(range(NUM_SAMPLES))
        steps = [samples[:GLOBAL_BATCH_SIZE], samples[GLOBAL_BATCH_SIZE:]]
        return {
            **expected_scores(recorder, num_layers, head_dim),
            **expected_contributions(recorder, num_layers, num_kv_heads, steps, sizes["num_attention_heads"]),
            **expected_moments(recorder, num_layers, head_dim),
        }


def compute_expected_inputs(checkpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs [T, C] and the weights of the unsharded model's projections, float64, by module."""
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    device = torch.device("cpu")
    with parallel_world(ParallelConfig(), device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), ParallelConfig(), device, SEQUENCE_LENGTH)
        recorder = Recorder(chunks[0])
        forward_only(chunks, [sample[None] for sample in make_tokens()], compute_loss=False)
        inputs = {name: torch.cat([x.flatten(0, -2) for x in calls]) for name, calls in recorder.inputs.items()}
        return inputs, recorder.weights


def score_in_all_dtypes(checkpoint: str, parallel: ParallelConfig) -> dict[str, dict[str, Tensor]]:
    from megascore.mcore.world.parallel_world import parallel_world

    device = torch.device("cpu")
    with parallel_world(parallel, device, timedelta(seconds=60)):
        scores = all_scores(NUM_STEPS) + moment_scores()
        return {dtype: _score(checkpoint, parallel, dtype, device, scores) for dtype in TOLERANCE}


def score(checkpoint: str, parallel: ParallelConfig, dtype: str, scores: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return some scores of a model, on one rank of the layout's world."""
    from megascore.mcore.world.parallel_world import parallel_world

    device = torch.device("cpu")
    with parallel_world(parallel, device, timedelta(seconds=60)):
        return _score(checkpoint, parallel, dtype, device, scores)


def _score(
    checkpoint: str, parallel: ParallelConfig, dtype: str, device: torch.device, scores: list[dict[str, Any]]
) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    import megascore
    from megascore.data import micro_batches_of_step
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only

    tokens = make_tokens()
    data: dict[str, Any] = {
        "data_rank": parallel_state.get_data_parallel_rank(),
        "data_size": parallel_state.get_data_parallel_world_size(),
    }
    # Interleaved schedules need a micro-batch for each stage, also in the short last step.
    micro_batch_size = 1 if parallel.virtual_pipeline > 1 else MICRO_BATCH_SIZE
    chunks = load_model(ModelConfig(hf=checkpoint, dtype=dtype), parallel, device, SEQUENCE_LENGTH)
    with megascore.attach(chunks, scores=scores) as run:
        for step in range(NUM_STEPS):
            slices = micro_batches_of_step(step, NUM_SAMPLES, GLOBAL_BATCH_SIZE, micro_batch_size, **data)
            forward_only(chunks, [tokens[part] for part in slices], compute_loss=False)
            run.step()
    return dict(run.finish())


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (NUM_SAMPLES, SEQUENCE_LENGTH), generator=generator)
