"""Stores of captured tensors: memory, a spool folder, the budget between, and what goes wrong there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megascore.capture import DeviceStore, HostStore, SpoolStore, TensorStore, stores
from megascore.errors import ConfigError, DataError

STORES: dict[str, Callable[[Path], TensorStore]] = {
    "device": lambda _: DeviceStore(),
    "host": lambda _: HostStore(),
    "spool": lambda folder: SpoolStore(folder),
    "spool with a budget": lambda folder: SpoolStore(folder, memory_bytes=100),
}
TENSORS = {
    "float": torch.randn(4, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "bool": torch.tensor([True, False]),
    "no dimension": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "complex": torch.polar(torch.ones(3), torch.arange(3.0)),
    "transposed": torch.randn(3, 4).T,
    "needs gradients": torch.randn(2, requires_grad=True),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TensorStore:
    return STORES[request.param](tmp_path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_as_it_was(store: TensorStore, name: str) -> None:
    tensor = TENSORS[name]
    store.put("a", tensor)
    found = store.get("a", "cpu")
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    assert not found.requires_grad


def test_what_is_kept_does_not_change_with_its_source_nor_with_a_copy(store: TensorStore) -> None:
    tensor = torch.ones(3)
    store.put("a", tensor)
    tensor += 1
    store.get("a", "cpu", copy=True).zero_()
    assert torch.equal(store.get("a", "cpu"), torch.ones(3))


def test_a_tensor_from_inference_mode_is_a_normal_one_later(store: TensorStore) -> None:
    with torch.inference_mode():
        store.put("a", torch.ones(3))
    found = store.get("a", "cpu")
    assert not found.is_inference()


def test_replacing_and_dropping_free_what_was_there(store: TensorStore) -> None:
    store.put("a", torch.ones(3))
    store.put("a", torch.ones(2))
    store.put("b", torch.ones(1))
    assert store.get("a", "cpu").shape == (2,)
    store.drop("a")
    store.drop("never there")
    assert "a" not in store
    assert "b" in store
    assert store.num_bytes in (0, 4)


def test_the_budget_is_kept_and_the_rest_goes_to_files(tmp_path: Path) -> None:
    store = SpoolStore(tmp_path, memory_bytes=100)
    for number in range(5):
        store.put(str(number), torch.full((10,), float(number)))  # 40 bytes
        assert store.num_bytes <= 100
    assert [path.stem for path in sorted(tmp_path.rglob("*.safetensors"))] == ["2", "3", "4"]
    # One in a file grows out of it, or into it.
    store.drop("0")
    store.put("2", torch.zeros(10))
    store.put("1", torch.zeros(100))
    assert sorted(path.stem for path in tmp_path.rglob("*.safetensors")) == ["1", "3", "4"]
    assert all(store.get(str(number), "cpu").numel() for number in (1, 2, 3, 4))


def test_closing_removes_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    store = SpoolStore(tmp_path)
    store.put("a", torch.ones(3))
    store.close()
    store.close()
    SpoolStore(tmp_path).put("never closed", torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SpoolStore(tmp_path, memory_bytes=0)
    store.put("a", torch.ones(3))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "write_whole", full)
    with pytest.raises(DataError, match="took 1 tensors, but not one more of .* No space left.*raise memory_bytes"):
        store.put("a", torch.zeros(3))
    assert torch.equal(store.get("a", "cpu"), torch.ones(3))


def test_nobody_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process leaves behind when it ends, or the machine does, is never read."""

    def refuse(_: int) -> None:
        raise AssertionError("synced")

    monkeypatch.setattr("megascore.files.whole.os.fsync", refuse)
    store = SpoolStore(tmp_path)
    store.put("a", torch.ones(3))
    assert torch.equal(store.get("a", "cpu"), torch.ones(3))


def test_a_damaged_or_missing_file_is_told(tmp_path: Path) -> None:
    store = SpoolStore(tmp_path)
    for damage in (flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-2]), Path.unlink):
        store.put("a", torch.ones(3))
        damage(next(tmp_path.rglob("*.safetensors")))
        with pytest.raises(DataError, match="spooled file .* (checksum differs|cannot be read)"):
            store.get("a", "cpu")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="spool folder .*file cannot be used"):
        SpoolStore(tmp_path / "file")
    with pytest.raises(ConfigError, match="memory_bytes=-1"):
        SpoolStore(tmp_path, memory_bytes=-1)


def test_tensors_of_any_source_are_equal_in_a_file_and_in_memory(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    for store in (SpoolStore(tmp_path), HostStore()):
        store.put("a", TENSORS["complex"].conj())
        kept.append(store.get("a", "cpu").resolve_conj())
    assert torch.equal(*kept)
