"""Loading checkpoints: the share that each rank reads. Tier: gloo processes, real Megatron on the CPU."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megascore.config import ParallelConfig
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.models.load_huggingface import HuggingFaceWeights, weave
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.huggingface.config import read_config
from tests.models import rename_tensors, save_checkpoint, tensors_of
from tests.pool import WorkerPool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", max_shard_size="100KB")


def bytes_read(directory: Path, parallel: ParallelConfig) -> int:
    with parallel_world(parallel, CPU, timedelta(minutes=1)):
        config = read_config(directory)
        chunks = build_gpt(config.architecture, parallel, torch.bfloat16, CPU, 16)
        return HuggingFaceWeights(config, directory).load(chunks)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in tensors_of(path).items()}


def test_each_rank_reads_only_its_share(world: WorkerPool, checkpoint: Path) -> None:
    tensors = all_tensors(checkpoint)
    everything = sum(tensor.nbytes for tensor in tensors.values())
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    last_layer = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.3." in name)
    head = sum(tensors[name].nbytes for name in ("lm_head.weight", "model.norm.weight"))

    assert world.run(1, bytes_read, checkpoint, ParallelConfig()) == [everything]
    split = (everything - norms) // 2 + norms
    assert world.run(2, bytes_read, checkpoint, ParallelConfig(tensor=2)) == [split, split]
    stages = ParallelConfig(pipeline=2, pipeline_layers=[3, 1])
    assert world.run(2, bytes_read, checkpoint, stages) == [everything - last_layer - head, last_layer + head]


def loaded(directories: list[Path]) -> list[dict[str, torch.Tensor]]:
    with parallel_world(ParallelConfig(), CPU, timedelta(minutes=1)):
        found = []
        for directory in directories:
            config = read_config(directory)
            chunks = build_gpt(config.architecture, ParallelConfig(), torch.float32, CPU, 16)
            HuggingFaceWeights(config, directory).load(chunks)
            found.append({name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()})
        return found


def test_a_model_is_the_same_under_the_other_names_of_its_tensors(world: WorkerPool, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ordinary", "llama")
    head_alone = {"model.embed_tokens.weight": "lm_head.weight"}
    renamed = [
        rename_tensors(folder, tmp_path / "no prefix", lambda name: name.removeprefix("model.")),
        rename_tensors(folder, tmp_path / "head alone", lambda name: head_alone.get(name, name)),
    ]
    [(expected, *others)] = world.run(1, loaded, [folder, *renamed])
    for other in others:
        assert other.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(other[name], value), name


def test_rows_take_turns_by_group() -> None:
    query, key = torch.arange(8).view(8, 1), torch.arange(100, 104).view(4, 1)
    assert weave([query, key], 2).flatten().tolist() == [0, 1, 2, 3, 100, 101, 4, 5, 6, 7, 102, 103]
