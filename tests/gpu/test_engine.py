"""Transformer Engine's modules as they are read, and what differs with several GPUs: each risky thing by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megascore
from megascore.capture.stores import HostStore
from megascore.hooks import IndependentChannelContributionHook, IndependentKvHeadContributionHook, L2NormHook
from megascore.kernels.products import product
from megascore.runs.evaluation import Evaluation
from tests.gpu.test_models import EXPERTS, assert_near, megatron, score_chunks
from tests.job.resumable import assert_same_scores, make_job
from tests.models import save_checkpoint
from tests.pool import WorkerPool

REPOSITORY = Path(__file__).parents[2]
WIDTH = 256


@pytest.fixture(scope="module")
def engine() -> Any:
    return pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine isn't installed: NGC has it")


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_the_output_of_a_fused_norm_is_computed_again_as_the_kernel_does(
    normalization: str, zero_centered: bool, engine: Any, device: torch.device
) -> None:
    from megascore.mcore.sites.fused_norm import fused_norm_output, has_fused_norm

    layer = engine.LayerNormLinear(
        WIDTH,
        WIDTH,
        normalization=normalization,
        zero_centered_gamma=zero_centered,
        return_layernorm_output=True,
        bias=False,
        params_dtype=torch.bfloat16,
        device=device,
    )
    nn.init.normal_(layer.layer_norm_weight, mean=0.0 if zero_centered else 1.0, std=0.02)
    x = torch.randn(4096, 1, WIDTH, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        expected = layer(x)[1]
    assert has_fused_norm(layer)
    found = fused_norm_output(layer, x)
    # One rounding to bfloat16; over the tokens they cancel, for the weights are not rounded.
    torch.testing.assert_close(found.double(), expected.double(), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(_means(found), _means(expected), rtol=3e-4, atol=0)


def _means(x: Tensor) -> Tensor:
    return x.double().abs().mean((0, 1))


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling"])
def test_weights_kept_in_fp8_are_read_as_numbers(recipe: str, engine: Any, device: torch.device) -> None:
    from transformer_engine.common import recipe as recipes

    needed = (10, 0) if recipe.startswith("MX") else (8, 9)
    if not hasattr(recipes, recipe) or torch.cuda.get_device_capability() < needed:
        pytest.skip(f"{recipe}: this GPU or this Transformer Engine has no such fp8")
    with engine.fp8_model_init(enabled=True, recipe=getattr(recipes, recipe)()):
        linear = engine.Linear(WIDTH, WIDTH, bias=False, params_dtype=torch.bfloat16, device=device)
    plain = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        plain.weight.copy_(linear.weight.dequantize())
    for make in (IndependentChannelContributionHook, lambda m: IndependentKvHeadContributionHook.for_heads(m, 4)):
        torch.testing.assert_close(make(linear).state["weight_norm"], make(plain).state["weight_norm"])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_products_keep_what_bfloat16_would_round(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    # Odd sizes and starts, as pruned channels leave them: no row begins where the fastest kernels want it.
    x = torch.randn(301, 515, device=device).to(dtypes[0])[:, 3:]
    weight = torch.randn(512, 77, device=device).to(dtypes[1])
    found = product(x, weight)
    assert found.dtype == torch.float32
    # 2^-17 of each factor, and sums of 512 in float32.
    torch.testing.assert_close(found.double(), x.double() @ weight.double(), rtol=0, atol=1e-3)


def score_moe(checkpoint: str, device: torch.device, dtype: str) -> dict[str, Tensor]:
    from megascore.config import ModelConfig, ParallelConfig
    from megascore.mcore.models.build import load_model

    def build() -> list[Any]:
        return load_model(ModelConfig(hf=checkpoint, dtype=dtype), ParallelConfig(), device, 64)

    return score_chunks(build, device, EXPERTS[:2])


def score_moe_on_cpu(checkpoint: str) -> dict[str, Tensor]:
    return score_moe(checkpoint, torch.device("cpu"), "float32")


def test_grouped_experts_score_as_experts_one_after_the_other(
    world: WorkerPool, device: torch.device, tmp_path: Path
) -> None:
    """Of Transformer Engine where it is installed: channels are read at its grouped linear layer."""
    sizes = {"head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 64}
    checkpoint = str(save_checkpoint(tmp_path / "moe", "qwen3_moe", **sizes))
    expected = world.run(1, score_moe_on_cpu, checkpoint)[0]
    # float32, or TF32 in Transformer Engine; the router decides in float32 on both.
    assert_near(score_moe(checkpoint, device, "float32"), expected, 1e-2)


def test_pinned_copies_outlive_their_source_and_their_name(device: torch.device) -> None:
    store, tensors = HostStore(), [torch.randn(1 << 20, device=device) for _ in range(4)]
    expected = [tensor.cpu() for tensor in tensors]
    for number in range(4):
        store.put("one", tensors[number])
        tensors[number].zero_()
        found = store.get("one", device)
        # Its memory is given to the next one while the copy to the device may still be under way.
        store.drop("one")
        store.put("other", torch.zeros(1 << 20, device=device))
        assert torch.equal(found.cpu(), expected[number])


def test_results_are_dumped_over_nccl(device: torch.device, tmp_path: Path) -> None:
    hook = L2NormHook()
    hook.observe(torch.randn(8, 2, 16, device=device), torch.empty(0, device=device))
    with megatron(device):
        assert dist.get_backend() == "nccl"
        L2NormHook.dump_activations_logs({"layer": hook}, tmp_path, {})
    assert (tmp_path / "rank_0.pth").is_file()


def test_a_compiled_model_is_heard(device: torch.device) -> None:
    linear = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(device)
    heard: list[int] = []
    compiled = torch.compile(linear)
    x = torch.randn(4, WIDTH, device=device)
    compiled(x)
    linear[0].register_forward_hook(lambda *_: heard.append(1))
    evaluation = Evaluation([compiled])
    compiled(x)
    evaluation.release()
    assert heard


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.pipeline=2",
        "parallel.pipeline=2 parallel.virtual_pipeline=2 run.micro_batch_size=4",
        "parallel.context=2",
        "",
    ],
    ids=["TP and SP", "PP", "virtual PP, fewer micro-batches than stages", "CP", "DP"],
)
def test_two_gpus_score_as_one(layout: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPU here: NCCL between two needs two")
    scores: list[megascore.Scores] = []
    for number, arguments in ((1, []), (2, layout.split())):
        job = make_job(tmp_path / str(number), tmp_path)
        command = ["bash", str(REPOSITORY / "launch" / "score.sh"), "--nproc-per-node", str(number), str(job.config)]
        result = subprocess.run(
            [*command, "run.device=cuda", *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "VIRTUAL_ENV": sys.prefix},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        scores.append(job.scores())
    # float64, so Megatron's own layers: sums in other orders.
    assert_same_scores(scores[1], scores[0], 1e-9)
