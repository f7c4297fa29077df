"""Checkpoints that are not as they should be, or not what they seem. Tier: real Megatron on the CPU, one process."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ModelError
from megascore.mcore.models.build import load_model
from megascore.mcore.models.checkpoint_args import architecture_from_args
from megascore.mcore.world.parallel_world import parallel_world
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint
from tests.mcore.torch_dist import Colour, move_common, training_args

CPU = torch.device("cpu")


class Bomb:
    """Runs a command when it is unpickled as pickle does it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def load(config: ModelConfig) -> list[Any]:
    with parallel_world(ParallelConfig(), CPU, timedelta(minutes=1)):
        return load_model(config, ParallelConfig(), CPU, 16)


def rewrite_index(folder: Path, change: Callable[[Metadata], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("among_weights", [False, True])
def test_objects_of_unknown_classes_are_read_as_inert_records(among_weights: bool, folder: Path) -> None:
    if among_weights:
        move_common(folder)
    common = MegatronCheckpoint(folder).common.values
    assert isinstance(common["args"], argparse.Namespace)
    assert repr(common["colour"]) == f"<{Colour.__module__}.Colour>"
    assert common["colour"].args == (1,)


def test_nothing_in_a_checkpoint_is_ever_run(folder: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Bomb(touched)))
    assert touched.exists(), "the bomb works"
    touched.unlink()

    torch.save({"args": Bomb(touched)}, folder / "common.pt")
    with pytest.raises(ModelError, match=r"common\.pt cannot be read: it names (posix|nt)\.system, which is never run"):
        architecture_from_args(MegatronCheckpoint(folder))
    move_common(folder, {"args": Bomb(touched)})
    with pytest.raises(ModelError, match=r"distcp cannot be read: it names (posix|nt)\.system, which is never run"):
        architecture_from_args(MegatronCheckpoint(folder))
    rewrite_index(folder, lambda metadata: setattr(metadata, "planner_data", Bomb(touched)))
    with pytest.raises(ModelError, match=r"\.metadata names (posix|nt)\.system, which has no place in the index"):
        MegatronCheckpoint(folder)
    assert not touched.exists()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite_weights(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def leave_out_a_part(folder: Path) -> None:
    rewrite_index(
        folder, lambda metadata: metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()
    )


def point_elsewhere(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../../weights"

    rewrite_index(folder, change)


def write_format(folder: Path, backend: str) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard gone": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp not found: .* says that it holds"),
    "shard cut short": (lambda f: cut_short(f / "__0_0.distcp"), r"__0_0\.distcp has \d+ bytes, .* cut short"),
    "shard overwritten": (lambda f: overwrite_weights(f / "__0_0.distcp"), r"__0_0\.distcp cannot be read: '.*' in it"),
    "no index": (lambda f: (f / ".metadata").unlink(), r"has no \.metadata, its index: .* not saved to the end"),
    "index cut short": (lambda f: cut_short(f / ".metadata"), r"\.metadata cannot be read as the index"),
    "index of something else": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps({})),
        r"\.metadata is no index of a torch\.distributed\.checkpoint",
    ),
    "index that leads elsewhere": (point_elsewhere, r"names the file '\.\./\.\./weights': expected files of its own"),
    "part not saved": (leave_out_a_part, r"holds 0 of the \d+ values at \[.*\] of 'decoder\.layers\.mlp\.linear_fc1"),
    "no common.pt": (
        lambda f: (f / "common.pt").unlink(),
        r"common\.pt not found, nor .*: the checkpoint is incomplete",
    ),
    "no dict": (lambda f: move_common(f, [1]), r"'common_state/.*' in .*__0_0\.distcp holds list, expected a dict"),
    "common state cut short": (
        lambda f: (move_common(f), cut_short(f / "__0_0.distcp")),
        r"'common_state/shard_0_1' in .*__0_0\.distcp cannot be read",
    ),
    "common.pt damaged": (lambda f: cut_short(f / "common.pt"), r"common\.pt cannot be read"),
    "another format": (lambda f: write_format(f, "zarr"), r"has the format 'zarr', expected 'torch_dist'"),
    "metadata.json damaged": (lambda f: (f / "metadata.json").write_text("{"), r"metadata\.json cannot be read"),
    "no checkpoint": (lambda f: (f / "metadata.json").unlink(), r"has neither metadata\.json nor latest_"),
    "folder gone": (shutil.rmtree, r"ck not found: model\.load names a Megatron torch_dist checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, folder: Path) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(load=str(folder), dtype="float32"))


def test_a_part_of_the_embedding_that_was_not_saved_is_no_padding(saved: Path, folder: Path) -> None:
    torch.save({"args": training_args(saved / "hf", vocab_size=127)}, folder / "common.pt")
    load(ModelConfig(load=str(folder), dtype="float32"))
    rewrite_index(
        folder, lambda metadata: metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks.pop()
    )
    with pytest.raises(ModelError, match=r"holds 0 of the 8128 values at \[0, 0\] of 'embedding\.word_embeddings"):
        load(ModelConfig(load=str(folder), dtype="float32"))


def test_a_latest_iteration_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ModelError, match=r"says '7', but .*iter_0000007 has no metadata\.json"):
        MegatronCheckpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(ModelError, match=r"says '\.\./elsewhere'"):
        MegatronCheckpoint(tmp_path)


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "other sizes": (
        {"intermediate_size": 64},
        r"'decoder\.layers\.mlp\.linear_fc1\.weight' .* has shape \[2, 192, 64\], expected \[2, 128, 64\]",
    ),
    "more layers": ({"num_hidden_layers": 3}, r"has shape \[2, 64\], expected \[3, 64\]"),
    "biases": ({"attention_bias": True}, r"has no tensor 'decoder\.layers\..*\.bias' of shape"),
    "one embedding less": ({"tie_word_embeddings": True}, r"has a tensor 'output_layer\.weight', which the model does"),
    "more tokens": ({"vocab_size": 200}, r"has 128 tokens, but the config\.json in model\.hf says 200"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_config_of_another_model_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    changes, message = OTHER_MODELS[case]
    raw = json.loads((saved / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(hf=str(tmp_path), load=str(saved / "ck"), dtype="float32"))


def test_weights_that_the_model_has_no_place_for_are_refused(saved: Path, tmp_path: Path) -> None:
    raw = json.loads((saved / "hf" / "config.json").read_text())
    # A qwen3 without the norms of its queries and keys, a llama, would run all the same, and wrongly.
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    with pytest.raises(ModelError, match=r"has a tensor 'decoder\.layers\.self_attention\.[qk]_layernorm\.weight'"):
        load(ModelConfig(hf=str(tmp_path), load=str(saved / "ck"), dtype="float32"))


def test_optimizer_and_random_states_are_no_weights(folder: Path) -> None:
    def add(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        entries["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"] = entries[
            "decoder.final_layernorm.weight"
        ]
        entries["chained_0.optimizer.state.fp32_param.embedding.word_embeddings.weight"] = entries[
            "embedding.word_embeddings.weight"
        ]

    before = MegatronCheckpoint(folder)
    rewrite_index(folder, add)
    after = MegatronCheckpoint(folder)
    assert len(after.index.tensors) == len(before.index.tensors) + 2
    assert after.weights == before.weights
    assert after.fingerprint() == before.fingerprint()
    load(ModelConfig(load=str(folder), dtype="float32"))


def test_names_may_have_the_prefix_that_nemo_gives_them(folder: Path) -> None:
    def rename(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        metadata.state_dict_metadata = {f"module.{name}": entry for name, entry in entries.items()}
        metadata.storage_data = {
            type(part)(f"module.{part.fqn}", part.offset): place for part, place in metadata.storage_data.items()
        }

    (plain,) = load(ModelConfig(load=str(folder), dtype="float32"))
    rewrite_index(folder, rename)
    assert MegatronCheckpoint(folder).prefix == "module."
    (renamed,) = load(ModelConfig(load=str(folder), dtype="float32"))
    for (name, one), (_, other) in zip(plain.named_parameters(), renamed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
