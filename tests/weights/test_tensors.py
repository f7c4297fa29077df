"""The table of tensors: rules of parameters, and the meaning of each dimension. Tier: pure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.dims import Dim, sizes_of
from megascore.weights.huggingface.folder import WeightsFolder
from megascore.weights.huggingface.sources import all_tensors, as_stored, find_rule, sources_of
from megascore.weights.huggingface.tensors import RULES
from tests.models import FAMILIES, save_checkpoint


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


CHECKPOINTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "mixtral fused": {"fused_experts": True},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_table_names_every_tensor_that_transformers_saves_and_the_size_of_each_dimension(
    checkpoint: str, tmp_path: Path
) -> None:
    # Sizes that differ from each other, so that no dimension can pass for another.
    changes = {"intermediate_size": 104, "vocab_size": 130, "head_dim": 28}
    folder = save_checkpoint(tmp_path, checkpoint.split()[0], **changes, **CHECKPOINTS[checkpoint])
    stored = WeightsFolder(folder).tensors
    config = as_stored(read_config(folder), stored)
    sizes = sizes_of(config)
    table = all_tensors(config)
    assert {name: tuple(sizes[dim] for dim in source.dims) for name, source in table.items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    used = [sizes[dim] for dim in {dim for source in table.values() for dim in source.dims}]
    assert len(set(used)) == len(used)
    for name, source in table.items():
        assert not source.parts
        assert source.layer == (int(name.split(".")[2]) if ".layers." in name else None)
        assert source.expert == (int(name.split(".")[5]) if "experts." in name and not config.fused_experts else None)


def test_every_meaning_of_a_dimension_has_a_size(tmp_path: Path) -> None:
    config = read_config(save_checkpoint(tmp_path, "llama"))
    assert set(sizes_of(config)) == set(get_args(Dim))


def test_a_tied_model_needs_its_embedding_only(tmp_path: Path) -> None:
    config = read_config(save_checkpoint(tmp_path, "qwen2"))
    assert "lm_head.weight" not in all_tensors(config)
    (source,) = sources_of(find_rule("output_layer.weight").rule, config, None)  # type: ignore[union-attr]
    assert source.name == "model.embed_tokens.weight"


def test_channels_are_cut_by_the_meaning_of_dimensions_alone(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(read_config(save_checkpoint(tmp_path, "llama", mlp_bias=True)), tmp_path)
    checkpoint.check()
    channels, cut = torch.tensor([5, 90]), {}
    with checkpoint.folder.reading() as read:
        for name, source in all_tensors(checkpoint.config).items():
            if source.layer == 3 and "ffn" in source.dims:
                cut[name] = read(name).index_select(source.dims.index("ffn"), channels)
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
        gate, up, down = (f"model.layers.3.mlp.{part}_proj" for part in ("gate", "up", "down"))

        def mlp(weights: Callable[[str], Tensor], keep: Tensor) -> Tensor:
            linear = torch.nn.functional.linear
            hidden = torch.nn.functional.silu(linear(x, weights(f"{gate}.weight"), weights(f"{gate}.bias")))
            hidden = hidden * linear(x, weights(f"{up}.weight"), weights(f"{up}.bias"))
            return linear(hidden * keep, weights(f"{down}.weight"))

        kept = torch.zeros(96).index_fill(0, channels, 1.0)
        # The same products; only zeros are added to them.
        torch.testing.assert_close(mlp(cut.__getitem__, torch.ones(2)), mlp(read, kept), rtol=1e-5, atol=1e-6)
