"""A config and the tensors of its checkpoint, checked against each other before any is read. Tier: pure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megascore.errors import ModelError
from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.sources import find_rule, sources_of
from tests.models import save_checkpoint, tensors_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", max_shard_size="100KB")


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in tensors_of(path).items()}


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
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
def test_a_tensor_that_is_not_as_it_should_be_is_named(
    checkpoint: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = all_tensors(checkpoint)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        HuggingFaceCheckpoint(read_config(checkpoint), tmp_path).check()


def test_tensors_that_nothing_uses_are_told_but_harmless_ones(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = all_tensors(checkpoint)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        HuggingFaceCheckpoint(read_config(checkpoint), tmp_path).check()
    assert not caplog.records
    tensors["adapter.weight"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        HuggingFaceCheckpoint(read_config(checkpoint), tmp_path).check()
    assert "1 tensors are not used, such as adapter.weight" in caplog.text


@pytest.mark.parametrize("fused", [False, True])
def test_one_expert_is_read_wherever_it_is_stored(fused: bool, tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(read_config(save_checkpoint(tmp_path, "mixtral", fused_experts=fused)), tmp_path)
    assert checkpoint.config.fused_experts is fused
    tensors = all_tensors(tmp_path)
    found = find_rule("decoder.layers.0.mlp.experts.linear_fc1.weight0")
    assert found is not None
    gate, up = sources_of(found.rule, checkpoint.config, 2, 3)
    if fused:
        expected = tensors["model.layers.2.mlp.experts.gate_up_proj"][3, 96 + 48 :]
    else:
        expected = tensors["model.layers.2.block_sparse_moe.experts.3.w3.weight"][48:]
    with checkpoint.reading() as read:
        assert torch.equal(read(up, 0, 1, 2), expected)
        assert read(gate, None, 0, 1).shape == (96, 64)


def test_parts_of_a_given_size_end_where_the_tensor_does(checkpoint: Path) -> None:
    opened = HuggingFaceCheckpoint(read_config(checkpoint), checkpoint)
    head = all_tensors(checkpoint)["lm_head.weight"]
    found = find_rule("output_layer.weight")
    assert found is not None
    (source,) = sources_of(found.rule, opened.config, None)
    with opened.reading() as read:
        parts = [read(source, 0, part, 4, size=50) for part in range(4)]
    assert [len(part) for part in parts] == [50, 50, 28, 0]
    assert torch.equal(torch.cat(parts), head)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings_must_be_the_same(same: bool, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "llama")
    tensors = {name: value.clone() for name, value in tensors_of(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if same else 1e-3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = HuggingFaceCheckpoint(read_config(folder), folder)
    if same:
        checkpoint.check()
        return
    with pytest.raises(ModelError, match=r"tie_word_embeddings=true, but 'lm_head\.weight' is not"):
        checkpoint.check()
