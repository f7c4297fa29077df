"""Loading checkpoints: what each rank reads, and what is refused. Tier: gloo processes, real Megatron on the CPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascore.config import ParallelConfig
from megascore.errors import ModelError
from megascore.mcore.models.build import build_model
from megascore.mcore.models.load_huggingface import Checkpoint, load_weights
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.tensors import RULES, all_sources, find_rule, weave
from tests.models import save_checkpoint
from tests.pool import WorkerPool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", max_shard_size="100KB")


def bytes_read(directory: Path, parallel: ParallelConfig) -> int:
    with parallel_world(parallel, CPU, timedelta(minutes=1)):
        config = read_config(directory)
        return load_weights(build_model(config, parallel, torch.bfloat16, CPU, 16), config, directory)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


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


def test_every_parameter_name_leads_to_its_rule_and_layer() -> None:
    assert find_rule("decoder.layers.7.mlp.linear_fc1.layer_norm_weight") == find_rule(
        "decoder.layers.7.pre_mlp_layernorm.weight"
    )
    found = find_rule("decoder.layers.12.self_attention.linear_qkv.weight")
    assert found is not None
    assert found[0].per_kv_head
    assert found[1] == 12
    sequential = find_rule("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight")
    assert sequential is not None
    assert sequential.expert == 3
    assert sequential == find_rule("decoder.layers.0.mlp.experts.linear_fc2.weight3")
    assert find_rule("decoder.layers.0.mlp.shared_experts.linear_fc1.weight") is None
    names = [name for rule in RULES for name in rule.parameters]
    assert len(names) == len(set(names))


def test_rows_take_turns_by_group() -> None:
    query, key = torch.arange(8).view(8, 1), torch.arange(100, 104).view(4, 1)
    assert weave([query, key], 2).flatten().tolist() == [0, 1, 2, 3, 100, 101, 4, 5, 6, 7, 102, 103]


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            drop("model.layers.2.mlp.up_proj.weight"),
            r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight' of shape \[96, 64\]",
        ),
        (drop("lm_head.weight"), r"no tensor 'lm_head\.weight' of shape \[128, 64\]"),
        (
            put("model.layers.1.self_attn.k_proj.weight", torch.zeros(128, 64)),
            r"'model\.layers\.1\.self_attn\.k_proj\.weight' in .*model\.safetensors has shape \[128, 64\], "
            r"expected \[64, 64\]",
        ),
        (
            put("model.norm.weight", torch.zeros(64, dtype=torch.int8)),
            r"'model\.norm\.weight' in .* has type I8, expected one of F64, F32, F16, BF16",
        ),
    ],
)
def test_a_tensor_that_is_not_as_it_should_be_is_named_before_any_is_read(
    checkpoint: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = all_tensors(checkpoint)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as damaged, pytest.raises(ModelError, match=message):
        damaged.check(read_config(checkpoint))
    assert damaged.num_bytes_read == 0


def test_tensors_that_nothing_uses_are_told_but_harmless_ones(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = all_tensors(checkpoint)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING), Checkpoint(tmp_path) as opened:
        opened.check(read_config(checkpoint))
    assert not caplog.records
    tensors["adapter.weight"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING), Checkpoint(tmp_path) as opened:
        opened.check(read_config(checkpoint))
    assert "1 tensors are not used, such as adapter.weight" in caplog.text


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*save_pretrained; pickled"):
        Checkpoint(tmp_path)


def test_a_damaged_or_absent_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    index: dict[str, Any] = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-0.*\.safetensors not found: .* holds \d+ tensors, such as"):
        Checkpoint(tmp_path)
    for name in set(index["weight_map"].values()):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model-0.*\.safetensors cannot be read as a safetensors file"):
        Checkpoint(tmp_path)
    for content in ("[]", '{"weight_map": []}', '{"weight_map": "a"}', '{"weight_map": {"a": ["b"]}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match=r"index\.json cannot be read as an index"):
            Checkpoint(tmp_path)


def test_a_tied_model_needs_its_embedding_only(tmp_path: Path) -> None:
    config = read_config(save_checkpoint(tmp_path, "qwen2"))
    names = [source.name for source in all_sources(config)]
    assert "lm_head.weight" not in names
    assert names.count("model.embed_tokens.weight") == 2
