"""The same scores on every layout: real Megatron-Core modules on gloo processes against a float64 oracle."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.scoring.config import ModelConfig, ParallelConfig
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

NUM_SAMPLES, SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 7, 16, 4, 2
"""7 samples in steps of 4: the last step is short, and gives two data-parallel ranks different numbers of samples."""

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""float64: only the order of additions differs between layouts. float32: the model's own sums differ as well."""

LAYOUTS = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor": 2}),
    "TP=2 with sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "PP=2": (2, {"pipeline": 2}),
    "PP=2 uneven": (2, {"pipeline": 2, "pipeline_layers": [1, 3]}),
    "PP=2 x VPP=2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP=2": (2, {}),
    "TP=2 x PP=2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "TP=2 x DP=2": (4, {"tensor": 2}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: Path) -> dict[str, Tensor]:
    return world.run(1, compute_expected, str(checkpoint))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_the_oracle_on(
    layout: str, world: WorkerPool, checkpoint: Path, expected: dict[str, Tensor]
) -> None:
    world_size, degrees = LAYOUTS[layout]
    ranks = world.run(world_size, score_in_all_dtypes, str(checkpoint), ParallelConfig(**degrees))
    for rank, by_dtype in enumerate(ranks):
        for dtype, scores in by_dtype.items():
            assert scores.keys() == expected.keys()
            for key, score in scores.items():
                message = f"{key} in {dtype} on rank {rank}"
                torch.testing.assert_close(score, expected[key], rtol=TOLERANCE[dtype], atol=0, msg=message)
                assert_same_order(score, expected[key], TOLERANCE[dtype], message)


def assert_same_order(score: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    """The order may differ only between scores that the tolerance can't tell apart."""
    ordered = expected[score.argsort(stable=True)]
    assert (ordered.diff() >= -2 * tolerance * ordered[1:].abs()).all(), f"order of {message}"


def compute_expected(checkpoint: str) -> dict[str, Tensor]:
    from megascore.mcore.build import load_model
    from megascore.mcore.schedule import forward_only
    from megascore.mcore.world import parallel_world
    from tests.mcore.oracle import Recorder, expected_scores

    device = torch.device("cpu")
    with parallel_world(ParallelConfig(), device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), ParallelConfig(), device, SEQUENCE_LENGTH)
        recorder = Recorder(chunks[0])
        forward_only(chunks, [sample[None] for sample in make_tokens()], compute_loss=False)
        head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        return expected_scores(recorder, SIZES["num_hidden_layers"], head_dim)


def score_in_all_dtypes(checkpoint: str, parallel: ParallelConfig) -> dict[str, dict[str, Tensor]]:
    from megascore.mcore.world import parallel_world

    device = torch.device("cpu")
    with parallel_world(parallel, device, timedelta(seconds=60)):
        return {dtype: _score(checkpoint, parallel, dtype, device) for dtype in TOLERANCE}


def _score(checkpoint: str, parallel: ParallelConfig, dtype: str, device: torch.device) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    import megascore
    from megascore.mcore.build import load_model
    from megascore.mcore.schedule import forward_only
    from megascore.scoring.data import micro_batches_of_step, num_steps

    tokens = make_tokens()
    data: dict[str, Any] = {
        "data_rank": parallel_state.get_data_parallel_rank(),
        "data_size": parallel_state.get_data_parallel_world_size(),
    }
    # Interleaved schedules need a micro-batch for each stage, also in the short last step.
    micro_batch_size = 1 if parallel.virtual_pipeline > 1 else MICRO_BATCH_SIZE
    chunks = load_model(ModelConfig(hf=checkpoint, dtype=dtype), parallel, device, SEQUENCE_LENGTH)
    with megascore.attach(chunks, recipe="minitron") as run:
        for step in range(num_steps(NUM_SAMPLES, GLOBAL_BATCH_SIZE)):
            slices = micro_batches_of_step(step, NUM_SAMPLES, GLOBAL_BATCH_SIZE, micro_batch_size, **data)
            forward_only(chunks, [tokens[part] for part in slices], compute_loss=False)
            run.step()
    return dict(run.finish())


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (NUM_SAMPLES, SEQUENCE_LENGTH), generator=generator)
