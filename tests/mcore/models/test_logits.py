"""Models from checkpoints against transformers, on every layout. Tier: gloo processes, real Megatron on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ConfigError, LayoutError, ModelError
from megascore.mcore.models.build import load_model
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.huggingface.config import read_config
from tests.mcore.logits import (
    CPU,
    NUM_SAMPLES,
    SEQUENCE_LENGTH,
    TIMEOUT,
    Expected,
    Output,
    relative_difference,
    run,
    run_models,
)
from tests.models import DENSE_FAMILIES, reference_loss
from tests.pool import WorkerPool

# head_dim 64 and a small base give rotary wavelengths on both sides of Llama 3's limits, so that scaling shows.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 2000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in DENSE_FAMILIES},
    "llama 3": (
        "llama",
        {"attention_bias": False, "mlp_bias": True, "head_dim": 64, "rope_parameters": LLAMA3},
    ),
    "sliding mistral": (
        "mistral",
        {"sliding_window": 7, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "partly sliding qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
}
LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2)),
    "tensor with sequence parallel": (2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline": (2, ParallelConfig(pipeline=2)),
    "uneven pipeline": (2, ParallelConfig(pipeline=2, pipeline_layers=[3, 1])),
    "virtual pipeline": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "tensor and uneven pipeline": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2, pipeline_layers=[1, 3])),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Expected:
    return Expected.of(MODELS, tmp_path_factory.mktemp("models"), world)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_loss_equal_those_of_transformers(
    layout: str,
    world: WorkerPool,
    expected: Expected,
) -> None:
    world_size, parallel = LAYOUTS[layout]
    tokens = expected.tokens
    ranks = world.run(world_size, run_models, expected.directories, parallel, tokens)
    for name, reference in expected.logits.items():
        for dtype in ("float32", "float64"):
            outputs = [rank[name, dtype] for rank in ranks]
            having = [output for output in outputs if output.logits is not None]
            assert len(having) == parallel.tensor, "the ranks of the last stage have the logits"
            for output in having:
                assert output.logits is not None
                # transformers computes norms and softmax in float32, whatever the model: 4 layers of its rounding.
                assert relative_difference(output.logits, reference) < 5e-6, (name, dtype)
                assert output.num_tokens == NUM_SAMPLES * (SEQUENCE_LENGTH - 1)
                assert output.nats / output.num_tokens == pytest.approx(reference_loss(reference, tokens), rel=1e-6)
            assert all(output.nats == 0.0 and output.num_tokens == 0 for output in outputs if output.logits is None)
        # float64 throughout: layouts differ only in the order of sums.
        exact, alone = having[0], expected.on_one_process[name, "float64"]
        assert exact.logits is not None
        assert alone.logits is not None
        assert exact.logits.dtype == torch.float64
        assert relative_difference(exact.logits, alone.logits) < 1e-12, name
        assert exact.nats == pytest.approx(alone.nats, rel=1e-12)


def run_without_loss(directory: Path, parallel: ParallelConfig, tokens: Tensor) -> tuple[int, Output, Output, bool]:
    """Calls of the final norm without loss, outputs without and with it, and whether no micro-batches do nothing."""
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float32"), parallel, CPU, SEQUENCE_LENGTH)
        calls: list[int] = []
        norm = chunks[-1].decoder.final_layernorm
        if norm is not None:
            norm.register_forward_hook(lambda *_: calls.append(1))
        nothing = forward_only(chunks, [], True)
        idle = nothing.num_tokens == 0 and nothing.nats.item() == 0.0 and not calls
        without = run(chunks, tokens, compute_loss=False)
        num_calls = len(calls)
        return num_calls, without, run(chunks, tokens, compute_loss=True), idle


def test_without_loss_the_output_layer_does_not_run(world: WorkerPool, expected: Expected) -> None:
    ranks = world.run(2, run_without_loss, expected.directories["llama"], ParallelConfig(pipeline=2), expected.tokens)
    num_calls, without, later, _ = ranks[1]
    assert num_calls == 3, "all three micro-batches reach the last norm"
    assert without == Output(None, 0.0, 0)
    assert later.logits is not None, "and the output layer is back afterwards"
    assert all(idle for *_, idle in ranks)


def bad_models(directories: dict[str, Path]) -> None:
    model = read_config(directories["llama"]).architecture
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        with pytest.raises(ModelError, match=r"sequence_length=129 is more than the model's 128 positions"):
            build_gpt(model, ParallelConfig(), torch.float32, CPU, 129)
        sliding = replace(model, sliding_window=8)
        with pytest.raises(LayoutError, match=r"parallel\.context=2 with sequences of 16, longer than .* window of 8"):
            build_gpt(sliding, ParallelConfig(context=2), torch.float32, CPU, 16)
        with pytest.raises(LayoutError, match=r"parallel\.tensor=4 does not divide the model's 2 KV heads"):
            build_gpt(model, ParallelConfig(tensor=4), torch.float32, CPU, 16)
        with pytest.raises(ConfigError, match=r"model\.hf is not given"):
            load_model(ModelConfig(), ParallelConfig(), CPU, 16)


def test_a_model_that_cannot_be_built_so_is_refused(world: WorkerPool, expected: Expected) -> None:
    world.run(1, bad_models, expected.directories)
