"""Models from checkpoints against transformers, on every layout. Tier: gloo processes, real Megatron on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megascore.errors import ConfigError, LayoutError, ModelError
from megascore.mcore.build import build_model, load_model
from megascore.mcore.huggingface.config import read_config
from megascore.mcore.schedule import forward_only
from megascore.mcore.world import parallel_world
from megascore.scoring.config import ModelConfig, ParallelConfig
from tests.models import DENSE_FAMILIES, reference_logits, reference_loss, save_checkpoint
from tests.pool import WorkerPool

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)
NUM_SAMPLES, SEQUENCE_LENGTH, MICRO_BATCH_SIZE = 5, 48, 2

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


@dataclass
class Output:
    """What one rank made of all samples; logits [B, S, V] on the last stage."""

    logits: Tensor | None
    nats: float
    num_tokens: int


def run(chunks: list[GPTModel], tokens: Tensor, *, compute_loss: bool) -> Output:
    local_logits: list[Tensor] = []
    if chunks[-1].post_process:
        chunks[-1].output_layer.register_forward_hook(lambda _module, _args, output: local_logits.append(output[0]))
    loss = forward_only(chunks, list(torch.split(tokens, MICRO_BATCH_SIZE)), compute_loss)
    logits = [gather_from_tensor_model_parallel_region(local).transpose(0, 1) for local in local_logits]
    return Output(torch.cat(logits) if logits else None, loss.nats.item(), loss.num_tokens)


def run_models(directories: dict[str, Path], parallel: ParallelConfig, tokens: Tensor) -> dict[tuple[str, str], Output]:
    with parallel_world(parallel, CPU, TIMEOUT):
        return {
            (name, dtype): run(
                load_model(ModelConfig(hf=str(directory), dtype=dtype), parallel, CPU, SEQUENCE_LENGTH),
                tokens,
                compute_loss=True,
            )
            for name, directory in directories.items()
            for dtype in ("float32", "float64")
        }


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_checkpoint(root / name, family, **changes) for name, (family, changes) in MODELS.items()}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (NUM_SAMPLES, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def references(directories: dict[str, Path], tokens: Tensor) -> dict[str, Tensor]:
    return {name: reference_logits(directory, tokens) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def on_one_process(world: WorkerPool, directories: dict[str, Path], tokens: Tensor) -> dict[tuple[str, str], Output]:
    outputs: dict[tuple[str, str], Output] = world.run(1, run_models, directories, ParallelConfig(), tokens)[0]
    return outputs


def relative_difference(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).abs().max() / reference.double().abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_loss_equal_those_of_transformers(
    layout: str,
    world: WorkerPool,
    directories: dict[str, Path],
    tokens: Tensor,
    references: dict[str, Tensor],
    on_one_process: dict[tuple[str, str], Output],
) -> None:
    world_size, parallel = LAYOUTS[layout]
    ranks = world.run(world_size, run_models, directories, parallel, tokens)
    for name, reference in references.items():
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
        exact, alone = having[0], on_one_process[name, "float64"]
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


def test_without_loss_the_output_layer_does_not_run(
    world: WorkerPool, directories: dict[str, Path], tokens: Tensor
) -> None:
    ranks = world.run(2, run_without_loss, directories["llama"], ParallelConfig(pipeline=2), tokens)
    num_calls, without, later, _ = ranks[1]
    assert num_calls == 3, "all three micro-batches reach the last norm"
    assert without == Output(None, 0.0, 0)
    assert later.logits is not None, "and the output layer is back afterwards"
    assert all(idle for *_, idle in ranks)


def bad_models(directories: dict[str, Path]) -> None:
    config = read_config(directories["llama"])
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        with pytest.raises(ModelError, match=r"sequence_length=129 is more than the model's 128 positions"):
            build_model(config, ParallelConfig(), torch.float32, CPU, 129)
        sliding = replace(config, sliding_window=8)
        with pytest.raises(LayoutError, match=r"parallel\.context=2 with sequences of 16, longer than .* window of 8"):
            build_model(sliding, ParallelConfig(context=2), torch.float32, CPU, 16)
        with pytest.raises(LayoutError, match=r"parallel\.tensor=4 does not divide the model's 2 KV heads"):
            build_model(config, ParallelConfig(tensor=4), torch.float32, CPU, 16)
        with pytest.raises(ConfigError, match=r"model\.hf is not given"):
            load_model(ModelConfig(), ParallelConfig(), CPU, 16)


def test_a_model_that_cannot_be_built_so_is_refused(world: WorkerPool, directories: dict[str, Path]) -> None:
    world.run(1, bad_models, directories)
