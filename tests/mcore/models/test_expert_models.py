"""Models with routed experts against transformers, on every layout. Tier: gloo processes, real Megatron on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from megascore.config import ParallelConfig
from megascore.weights.huggingface.config import read_config
from tests.mcore.logits import Expected, relative_difference, run_models
from tests.mcore.models.test_load import bytes_read
from tests.models import reference_loss, tensors_of
from tests.pool import WorkerPool

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe with dense layers": ("qwen3_moe", {}),
    "qwen3_moe, normalized": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    "mixtral, fused": ("mixtral", {"fused_experts": True}),
    "qwen3_moe, fused": ("qwen3_moe", {"fused_experts": True, "sliding_window": 9, "use_sliding_window": True}),
}
LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2)),
    "expert": (2, ParallelConfig(expert=2)),
    "expert tensor": (2, ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
    "expert tensor over data": (2, ParallelConfig(expert_tensor=2)),
    "pipeline": (2, ParallelConfig(pipeline=2, pipeline_layers=[3, 1])),
    "tensor and expert": (2, ParallelConfig(tensor=2, sequence=True, expert=2)),
    "expert, expert tensor and data": (4, ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=2)),
    "virtual pipeline and expert": (4, ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2)),
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
        having = [rank[name, "float32"] for rank in ranks if rank[name, "float32"].logits is not None]
        assert having
        for output in having:
            assert output.logits is not None
            # transformers computes norms and softmax in float32, whatever the model: 4 layers of its rounding.
            assert relative_difference(output.logits, reference) < 5e-6, name
            assert output.nats / output.num_tokens == pytest.approx(reference_loss(reference, tokens), rel=1e-6)
        exact = [rank[name, "float64"] for rank in ranks if rank[name, "float64"].logits is not None]
        alone = expected.on_one_process[name, "float64"]
        assert alone.logits is not None
        for output in exact:
            assert output.logits is not None
            # Megatron takes the router's softmax in float32: a sum in another order may round it to the next number.
            assert relative_difference(output.logits, alone.logits) < 1e-7, name


def test_each_rank_reads_only_its_experts(world: WorkerPool, expected: Expected) -> None:
    directories = expected.directories
    for name in ("mixtral", "mixtral, fused"):
        tensors = tensors_of(directories[name] / "model.safetensors")
        everything = sum(tensor.nbytes for tensor in tensors.values())
        experts = sum(tensor.nbytes for key, tensor in tensors.items() if "experts." in key)
        assert experts > everything / 2
        assert world.run(1, bytes_read, directories[name], ParallelConfig()) == [everything]
        assert world.run(2, bytes_read, directories[name], ParallelConfig(expert=2)) == [everything - experts // 2] * 2


def test_layers_with_experts_are_those_that_transformers_has_them_in(expected: Expected) -> None:
    def layers(name: str) -> str:
        experts = read_config(expected.directories[name]).architecture.experts
        assert experts is not None
        return "".join(str(int(has_experts)) for has_experts in experts.layers)

    assert layers("mixtral") == "1111"
    assert layers("qwen3_moe with dense layers") == "1011"
    assert layers("qwen3_moe, normalized") == "0101"
