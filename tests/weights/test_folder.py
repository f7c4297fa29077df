"""Files of a folder: those that count, what is read of them, and what is wrong with them. Tier: pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megascore.blockwise.moving_weights import MovingWeights
from megascore.errors import ModelError
from megascore.weights.huggingface.folder import INDEX, SINGLE, WeightsFolder

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1234\n"
FINGERPRINT = "02d39eac8c0f847c9f0f547c5575bc30bf7e46c1635148275d376d410e706609"
"""Fingerprint of `tensors` as version 0.1.0 wrote it into score files and checkpoints."""


def tensors() -> dict[str, Tensor]:
    """Return a tensor longer than its samples, one shorter, and an empty one."""
    return {
        "a.weight": torch.arange(6000, dtype=torch.float32).reshape(2, 3000),
        "a": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.ones(0),
    }


def save(folder: Path, *, sharded: bool) -> Path:
    """Save `tensors` in one file, or in two with an index."""
    folder.mkdir(exist_ok=True)
    if not sharded:
        save_file(tensors(), folder / SINGLE)
        return folder
    files = {"a.weight": "model-1.safetensors", "a": "model-2.safetensors", "empty": "model-1.safetensors"}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors().items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    opened = WeightsFolder(folder)
    with opened.reading() as read:
        return {name: read(name) for name in opened.tensors}


@pytest.mark.parametrize("sharded", [False, True])
def test_all_tensors_are_found_with_what_their_headers_say(sharded: bool, tmp_path: Path) -> None:
    folder = WeightsFolder(save(tmp_path, sharded=sharded))
    described = {name: (stored.dtype, stored.shape) for name, stored in folder.tensors.items()}
    assert described == {"a.weight": ("F32", (2, 3000)), "a": ("BF16", (3,)), "empty": ("F32", (0,))}
    with folder.reading() as read:
        assert all(torch.equal(read(name), tensor) for name, tensor in tensors().items())
        assert read("a.weight", (slice(1, 2), slice(10, 13))).tolist() == [[3010.0, 3011.0, 3012.0]]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fingerprint_is_what_it_always_was_however_the_tensors_are_spread(sharded: bool, tmp_path: Path) -> None:
    assert WeightsFolder(save(tmp_path, sharded=sharded)).fingerprint() == FINGERPRINT


def test_a_fingerprint_tells_names_types_shapes_and_values_apart(tmp_path: Path) -> None:
    changes: list[dict[str, Tensor]] = [
        {},
        {"a": torch.ones(3)},
        {"a": torch.ones(1, 3, dtype=torch.bfloat16)},
        {"a": torch.tensor([1, 1, 2], dtype=torch.bfloat16)},
        {"b": torch.ones(3)},
    ]
    found = set()
    for change in changes:
        save_file({**tensors(), **change}, tmp_path / SINGLE)
        found.add(WeightsFolder(tmp_path).fingerprint())
    assert len(found) == len(changes)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("content", ["other weights", "the same tensors", LFS_POINTER, b"", b"\xff" * 16], ids=repr)
def test_a_file_beside_those_that_count_changes_nothing(content: Any, sharded: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, sharded=sharded)
    beside = folder / "consolidated.safetensors"
    if isinstance(content, bytes):
        beside.write_bytes(content)
    else:
        save_file(tensors() if content == "the same tensors" else {"tok_embeddings": torch.ones(5)}, beside)
    assert WeightsFolder(folder).fingerprint() == FINGERPRINT
    assert read_all(folder).keys() == tensors().keys()
    MovingWeights(torch.nn.Linear(2, 2), "cpu", folder)


def test_an_index_counts_before_a_single_file(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    (tmp_path / SINGLE).write_bytes(LFS_POINTER)
    assert read_all(tmp_path).keys() == tensors().keys()


def test_without_index_and_single_file_all_files_count(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    (tmp_path / INDEX).unlink()
    assert WeightsFolder(tmp_path).fingerprint() == FINGERPRINT
    save_file({"a": torch.ones(3)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"tensor 'a' is both in .*model-2\.safetensors and in .*more\.safetensors"):
        WeightsFolder(tmp_path)


def test_a_tensor_that_two_shards_hold_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    save_file(tensors(), tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"tensor 'a' is both in .*model-1\.safetensors and in .*model-2\.safetensors"):
        WeightsFolder(tmp_path)


def test_a_tensor_that_the_index_names_and_its_file_lacks_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    save_file({"other": torch.ones(3)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ModelError, match=r"model-2\.safetensors has no tensor 'a', which .*index\.json says is in it"):
        WeightsFolder(tmp_path)


def test_a_file_that_git_lfs_has_not_fetched_is_told(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(LFS_POINTER)
    with pytest.raises(ModelError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        WeightsFolder(tmp_path)


def test_an_absent_or_damaged_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharded=True)
    shard = tmp_path / "model-1.safetensors"
    for damaged in (b"", b"\xff" * 20, shard.read_bytes()[:100], shard.read_bytes()[:-1]):
        shard.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model-1\.safetensors cannot be read as a safetensors file: .*good copy"):
            WeightsFolder(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors not found: .* holds 2 tensors, such as 'a\.weight'"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, [], ["a.safetensors"], "a.safetensors", 3, None, {"a": 1}, {"a": ["b"]}])
def test_an_index_that_maps_no_names_to_files_is_told(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"index\.json cannot be read as an index .*: expected a mapping"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b"\xff"])
def test_an_index_that_is_none_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ModelError, match=r"index\.json cannot be read as an index with a weight_map: .*good copy"):
        WeightsFolder(tmp_path)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*save_pretrained; pickled"):
        WeightsFolder(tmp_path)


def test_what_has_changed_since_the_headers_were_read_is_told(tmp_path: Path) -> None:
    folder = WeightsFolder(save(tmp_path, sharded=False))
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE)
    for name, message in (("a", "a has changed its shape while it was in use"), ("empty", "cannot be read as")):
        with folder.reading() as read, pytest.raises(ModelError, match=message):
            read(name)
    (tmp_path / SINGLE).unlink()
    with folder.reading() as read, pytest.raises(ModelError, match=r"model\.safetensors cannot be read as"):
        read("a")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as"):
        folder.fingerprint()
