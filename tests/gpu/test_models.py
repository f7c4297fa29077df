"""Whole models on a GPU: NCCL, Megatron-Core's own schedule, bfloat16, fused norms; scores are the CPU's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

import megascore
from megascore.config import ModelConfig, ParallelConfig, load_config
from megascore.environment import look_around
from tests.gpu.conftest import sync_debug_mode
from tests.mcore.expert_model import Variant, build_expert_model
from tests.mcore.oracle import all_scores
from tests.models import SIZES, load_with_transformers, save_checkpoint
from tests.pool import WorkerPool

LENGTH, NUM_SAMPLES = 64, 4
ADDITIVE = [score for score in all_scores(1) if score.get("method") != "iterative_contribution"]
EXPERTS = [{"target": "experts"}, {"target": "expert_ffn"}, {"target": "shared_expert_ffn"}]
DTYPE_TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1}
"""Against the CPU in float64. float64: other orders of additions. The others: the model itself, through four layers, in
products of 24 and 8 bits (float32 attention of Transformer Engine may use TF32, which has 11)."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Transformer Engine wants sizes that are multiples of 16.
    sizes = {"head_dim": 32, "intermediate_size": 128, "tie_word_embeddings": False}
    return str(save_checkpoint(tmp_path_factory.mktemp("gpu") / "qwen3", "qwen3", **sizes))


@pytest.fixture(scope="module")
def packages() -> dict[str, Any]:
    return {package.name: package for package in look_around().packages}


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SIZES["vocab_size"], (NUM_SAMPLES, LENGTH), generator=generator)


@contextmanager
def megatron(device: torch.device) -> Iterator[None]:
    """A world of one with Megatron's groups: with NCCL on a GPU, in the pool's on the CPU."""
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(ParallelConfig(), device, timedelta(seconds=120)):
        yield


def score_chunks(
    build: Callable[[], list[Any]], device: torch.device, scores: list[dict[str, Any]]
) -> dict[str, Tensor]:
    from megascore.mcore.pipeline.schedule import forward_only

    with megatron(device):
        chunks = build()
        with megascore.attach(chunks, scores=scores) as run:
            forward_only(chunks, list(make_tokens().remainder(64).split(2)), compute_loss=True)
            run.step()
        return dict(run.finish())


def score_checkpoint(checkpoint: str, device: torch.device, dtype: str) -> dict[str, Tensor]:
    from megascore.mcore.models.build import load_model

    def build() -> list[Any]:
        return load_model(ModelConfig(hf=checkpoint, dtype=dtype), ParallelConfig(), device, LENGTH)

    return score_chunks(build, device, ADDITIVE)


def score_checkpoint_on_cpu(checkpoint: str) -> dict[str, Tensor]:
    return score_checkpoint(checkpoint, torch.device("cpu"), "float64")


def score_experts(device: torch.device, variant: Variant) -> dict[str, Tensor]:
    return score_chunks(lambda: build_expert_model(ParallelConfig(), variant), device, EXPERTS)


def score_experts_on_cpu() -> dict[str, Tensor]:
    return score_experts(torch.device("cpu"), Variant("alltoall"))


@pytest.fixture(scope="module")
def on_cpu(world: WorkerPool, checkpoint: str) -> dict[str, Tensor]:
    """In a process of its own, as this one uses CUDA."""
    return dict(world.run(1, score_checkpoint_on_cpu, checkpoint)[0])


def assert_near(scores: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        # 1 - cosine is as exact as 1 is.
        atol = tolerance if "block_similarity" in key else 0.0
        torch.testing.assert_close(
            value, expected[key], rtol=tolerance, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("dtype", DTYPE_TOLERANCE)
def test_local_layers_score_as_on_the_cpu(
    dtype: str, checkpoint: str, on_cpu: dict[str, Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megascore.mcore.models import spec

    monkeypatch.setattr(spec, "has_transformer_engine", lambda: False)
    assert_near(score_checkpoint(checkpoint, device, dtype), on_cpu, DTYPE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_fused_by_transformer_engine_are_sites_with_the_same_scores(
    dtype: str, checkpoint: str, on_cpu: dict[str, Tensor], device: torch.device, packages: dict[str, Any]
) -> None:
    engine = packages["Transformer Engine"]
    if not engine.works:
        pytest.skip(f"{engine.why_not}: {engine.problem or 'NGC images have it'}")
    assert_near(score_checkpoint(checkpoint, device, dtype), on_cpu, DTYPE_TOLERANCE[dtype])


def test_norms_of_apex_are_sites_with_the_same_scores(
    checkpoint: str, device: torch.device, packages: dict[str, Any]
) -> None:
    apex = packages["apex"]
    if not apex.works:
        pytest.skip(f"{apex.why_not}: {apex.problem or 'NGC images have it'}")
    from apex.normalization import FusedRMSNorm

    scores = []
    for fused in (False, True):
        model = load_plain(checkpoint, torch.float32).to(device)
        if fused:
            for parent in list(model.modules()):
                for name, norm in list(parent.named_children()):
                    if name in ("input_layernorm", "post_attention_layernorm", "norm"):
                        replacement = FusedRMSNorm(len(norm.weight), eps=norm.variance_epsilon).to(device)
                        replacement.weight = norm.weight
                        setattr(parent, name, replacement)
        scores.append(score_plain(model, device))
    # float32 kernels that round otherwise.
    assert_near(scores[1], scores[0], 1e-3)


def test_experts_score_as_on_the_cpu(world: WorkerPool, device: torch.device) -> None:
    expected = world.run(1, score_experts_on_cpu)[0]
    # The router's sigmoid is in float32 from Megatron-Core 0.18 on.
    assert_near(score_experts(device, Variant("alltoall")), expected, 1e-6)


def test_a_world_of_one_talks_over_nccl(device: torch.device) -> None:
    from megascore.parallel.comm import max_over_world, sum_in_place

    with megatron(device):
        assert dist.get_backend() == "nccl"
        tensor = torch.arange(3, device=device)
        dist.all_reduce(tensor)
        sum_in_place([tensor])
        assert tensor.tolist() == [0, 1, 2]
        assert max_over_world([3, 0]) == [3, 0]


def load_plain(checkpoint: str, dtype: torch.dtype) -> nn.Module:
    return load_with_transformers(checkpoint, dtype)


def score_plain(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    with megascore.attach(model, scores=all_scores(2)) as run, torch.no_grad():
        for batch in make_tokens().to(device).split(2):
            model(batch, use_cache=False)
            run.step()
    return dict(run.finish())


def test_a_hugging_face_model_scores_as_on_the_cpu(checkpoint: str, device: torch.device) -> None:
    expected = score_plain(load_plain(checkpoint, torch.float64), torch.device("cpu"))
    # float64: the order of additions differs, and so the iterative score, too, is the same.
    assert_near(score_plain(load_plain(checkpoint, torch.float64).to(device), device), expected, 1e-9)


@pytest.mark.parametrize("library", ["Hugging Face", "Megatron"])
def test_scoring_adds_no_wait_to_a_forward_pass(library: str, checkpoint: str, device: torch.device) -> None:
    from megascore.mcore.models.build import load_model

    tokens = make_tokens().to(device)
    positions = torch.arange(LENGTH, device=device).expand(NUM_SAMPLES, -1)
    with megatron(device):
        if library == "Megatron":
            chunks = load_model(ModelConfig(hf=checkpoint, dtype="bfloat16"), ParallelConfig(), device, LENGTH)
            model: Any = chunks[0]
        else:
            model = load_plain(checkpoint, torch.bfloat16).to(device)

        def forward() -> None:
            if library == "Megatron":
                model(tokens, positions, None)
            else:
                model(tokens, use_cache=False)

        with torch.no_grad():
            forward()
            with sync_debug_mode("warn") as without:
                forward()
            with megascore.attach(model, scores=ADDITIVE) as run:
                forward()
                torch.cuda.synchronize()
                with sync_debug_mode("warn") as with_hooks:
                    forward()
                run.step()
    assert with_hooks == without
    assert run.finish().metadata["num_tokens"] == 2 * NUM_SAMPLES * LENGTH


def test_a_job_runs_saves_and_goes_on_in_bfloat16(tmp_path: Path) -> None:
    from megascore.job.job import run_job
    from tests.job.resumable import NUM_STEPS, make_job

    job = make_job(tmp_path / "job", tmp_path, dtype="bfloat16")
    shown = io.StringIO()
    overrides = ["run.device=cuda"]
    first = run_job(load_config(job.config, overrides), Console(file=shown, width=200))
    assert first is not None
    assert first.metadata["num_steps"] == NUM_STEPS
    # The score file is gone, and the newest checkpoint has the last step but one at least.
    job.output.unlink()
    again = run_job(load_config(job.config, overrides), Console(file=shown, width=200))
    assert again is not None
    assert "going on from" in shown.getvalue()
    for key, value in first.items():
        # The same statistics, or the same kernels on the same data.
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cache_block_outputs", [True, False], ids=["cached", "fresh"])
def test_a_model_in_host_memory_is_scored_block_by_block_on_the_gpu(
    cache_block_outputs: bool, checkpoint: str, device: torch.device
) -> None:
    expected = score_plain(load_plain(checkpoint, torch.float64).to(device), device)
    model = load_plain(checkpoint, torch.float64)
    batches = list(make_tokens().split(2))
    found = megascore.score_blockwise(
        model, None, batches, all_scores(2), cache_block_outputs=cache_block_outputs, device="cuda"
    )
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
    # float64, and the same kernels: at most the order of additions differs.
    assert_near(dict(found), expected, 1e-9)


BLOCKWISE_TOLERANCE = {"float64": 1e-9, "bfloat16": 1e-6}
"""Each layer gets the same numbers as in a full pass, and runs the same kernels."""


@pytest.mark.parametrize("dtype", BLOCKWISE_TOLERANCE)
def test_a_job_that_runs_layer_by_layer_gives_the_scores_of_a_full_pass(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megascore.job.job import run_job
    from megascore.mcore.models import spec
    from tests.job.resumable import assert_same_scores, make_job

    if dtype == "float64":
        # Transformer Engine has no kernels for it.
        monkeypatch.setattr(spec, "has_transformer_engine", lambda: False)
    scores = []
    for name, overrides in (("full", []), ("blockwise", ["run.blockwise=true"])):
        job = make_job(tmp_path / name, tmp_path, dtype=dtype)
        config = load_config(job.config, ["run.device=cuda", *overrides])
        run_job(config, Console(file=io.StringIO(), width=200))
        scores.append(job.scores())
    assert scores[1].metadata["blockwise"]["num_blocks"] == 4
    assert_same_scores(scores[1], scores[0], BLOCKWISE_TOLERANCE[dtype])
