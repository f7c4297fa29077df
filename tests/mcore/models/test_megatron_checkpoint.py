"""Megatron's own checkpoints, loaded on other layouts than they were saved on. Tier: gloo processes, real Megatron."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.models.choose import model_source
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint
from tests.mcore.logits import run
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.models import save_checkpoint
from tests.old_versions import needs_parts_of_files
from tests.pool import WorkerPool

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": False}),
}
SAVED_ON = {
    "llama": (4, ParallelConfig(tensor=2, pipeline=2, pipeline_layers=[3, 1])),
    "mixtral": (2, ParallelConfig(expert=2)),
    "qwen3_moe": (2, ParallelConfig(tensor=2, sequence=True, expert_tensor=2)),
}
LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline": (2, ParallelConfig(pipeline=2)),
    "virtual pipeline and tensor": (4, ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2)),
}


def save(directory: Path, folder: Path, parallel: ParallelConfig, naming: dict[str, Any] | None) -> None:
    """Load a Hugging Face checkpoint and save it as Megatron does."""
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float32"), parallel, CPU, 16)
        save_torch_dist(chunks, folder, args=training_args(directory), metadata=naming)


def logits_of(configs: dict[str, ModelConfig], parallel: ParallelConfig, tokens: Tensor) -> dict[str, Tensor | None]:
    with parallel_world(parallel, CPU, TIMEOUT):
        return {
            name: run(load_model(config, parallel, CPU, tokens.shape[1]), tokens, compute_loss=True).logits
            for name, config in configs.items()
        }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Path:
    """Return a folder with Hugging Face checkpoints ``hf-*`` and, from them, Megatron's."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (family, changes) in MODELS.items():
        save_checkpoint(root / f"hf-{name}", family, **changes)
        world.run(SAVED_ON[name][0], save, root / f"hf-{name}", root / name / "iter_0000010", SAVED_ON[name][1], None)
        (root / name / "latest_checkpointed_iteration.txt").write_text("10\n")
    numbered = {"singleton_local_shards": True}
    world.run(2, save, root / "hf-mixtral", root / "numbered", ParallelConfig(tensor=2, sequence=True), numbered)
    return root


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_gives_the_model_that_was_saved_on_any_layout(
    layout: str, root: Path, tokens: Tensor, world: WorkerPool
) -> None:
    world_size, parallel = LAYOUTS[layout]
    configs = {
        **{f"hf-{name}": ModelConfig(hf=str(root / f"hf-{name}"), dtype="float32") for name in MODELS},
        # What model it is: from its own args, and from a config.json.
        **{f"args {name}": ModelConfig(load=str(root / name), dtype="float32") for name in MODELS},
        **{
            f"config {name}": ModelConfig(hf=str(root / f"hf-{name}"), load=str(root / name), dtype="float32")
            for name in MODELS
        },
        "args numbered": ModelConfig(load=str(root / "numbered"), dtype="float32"),
    }
    same = {"args numbered": "mixtral"}
    ranks = world.run(world_size, logits_of, configs, parallel, tokens)
    for name in configs:
        expected = f"hf-{same.get(name, name.split()[-1].removeprefix('hf-'))}"
        pairs = [(rank[name], rank[expected]) for rank in ranks if rank[expected] is not None]
        assert pairs
        for found, wanted in pairs:
            # The same weights on the same layout: the same sums in the same order.
            assert torch.equal(found, wanted), name


def test_a_checkpoint_says_what_it_is(root: Path) -> None:
    by_latest = MegatronCheckpoint(root / "llama")
    assert by_latest.folder == MegatronCheckpoint(root / "llama" / "iter_0000010").folder
    assert by_latest.name == "llama"
    assert by_latest.vocab_size == 128
    assert not any(by_latest.naming.values())
    assert MegatronCheckpoint(root / "qwen3_moe").naming["non_homogeneous_layers"]
    assert all(MegatronCheckpoint(root / "numbered").naming.values())
    assert not any("_extra_state" in name for name in by_latest.weights)


def test_fingerprints_tell_checkpoints_apart(root: Path) -> None:
    fingerprints = {MegatronCheckpoint(root / name).fingerprint() for name in (*MODELS, "numbered")}
    assert len(fingerprints) == len(MODELS) + 1
    assert model_source(ModelConfig(load=str(root / "llama"))).fingerprint() in fingerprints


def read_share(folder: Path, parallel: ParallelConfig) -> tuple[int, int]:
    """Bytes that a rank reads, and bytes of its parameters."""
    from megascore.mcore.models.load_torch_dist import TorchDistWeights

    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = model_source(ModelConfig(load=str(folder))).build(parallel, torch.float32, CPU, 16)
        num_bytes = TorchDistWeights(MegatronCheckpoint(folder)).load(chunks)
        return num_bytes, sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())


@needs_parts_of_files
def test_each_rank_reads_only_the_parts_that_it_has(root: Path, world: WorkerPool) -> None:
    for num_read, num_own in world.run(2, read_share, root / "mixtral", ParallelConfig(expert=2)):
        assert num_read == num_own
    # Saved with whole matrices, which each rank has half the rows or columns of.
    for num_read, num_own in world.run(2, read_share, root / "mixtral", ParallelConfig(tensor=2, sequence=True)):
        assert num_read == num_own


def read_layers(folder: Path, parallel: ParallelConfig) -> list[tuple[int, int, bool]]:
    """Bytes read and bytes had, outside of layers and by layer, and whether they are those of a model read at once."""
    from megascore.mcore.models.empty_layers import built_empty, filled
    from megascore.mcore.pipeline.layers import layers_of

    with parallel_world(parallel, CPU, TIMEOUT):
        source = model_source(ModelConfig(load=str(folder), dtype="float32"))
        (whole,) = source.build(parallel, torch.float32, CPU, 16)
        source.load([whole])
        with built_empty():
            (chunk,) = source.build(parallel, torch.float32, CPU, 16)
        found = []
        num_read = source.weights.load([chunk])
        for name, weight in chunk.named_parameters():
            assert weight.is_meta or torch.equal(weight, whole.get_parameter(name)), name
        outside = [weight for weight in chunk.parameters() if not weight.is_meta]
        found.append((num_read, sum(weight.nbytes for weight in outside), True))
        for layer, same in zip(layers_of(chunk), layers_of(whole), strict=True):
            with filled(layer, CPU):
                num_read = source.weights.load_layer(chunk, layer)
                pairs = zip(layer.parameters(), same.parameters(), strict=True)
                equal = all(torch.equal(one, other) for one, other in pairs)
                found.append((num_read, sum(weight.nbytes for weight in layer.parameters()), equal))
            assert all(weight.is_meta for weight in layer.parameters())
        return found


@pytest.mark.parametrize("model", [*MODELS, "numbered"])
def test_a_layer_is_read_by_itself(model: str, root: Path, world: WorkerPool) -> None:
    for found in world.run(2, read_layers, root / model, ParallelConfig(pipeline=2)):
        assert len(found) == 3
        assert all(num_read == num_own and equal for num_read, num_own, equal in found), found
