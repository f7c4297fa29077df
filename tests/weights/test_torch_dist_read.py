"""Boxes of tensors are read from files as they are cut from the tensors, and nothing else is read. Tier: pure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megascore.errors import ModelError
from megascore.weights.torch_dist.checkpoint import find_iteration
from megascore.weights.torch_dist.index import CheckpointIndex
from megascore.weights.torch_dist.read import fill_from_part, overlaps
from tests.old_versions import needs_parts_of_files

NAME = "weight"
FILE = "__0_0.distcp"


def write(folder: Path, whole: Tensor, cuts: list[list[int]], *, transposed: bool = False) -> CheckpointIndex:
    """Save a tensor in parts, as torch.distributed.checkpoint does; ``cuts`` are the sizes along each dimension."""
    boxes: list[list[tuple[int, int]]] = [[]]
    for sizes in cuts:
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        boxes = [[*box, cut] for box in boxes for cut in zip(begins, sizes, strict=True)]
    chunks, places = [], {}
    with (folder / FILE).open("wb") as file:
        file.write(b"something before")
        for box in boxes:
            part = whole[tuple(slice(begin, begin + size) for begin, size in box)].clone()
            part = part.mT.contiguous().mT if transposed else part
            begin = file.tell()
            torch.save(part, file)
            offsets = torch.Size(begin for begin, _ in box)
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            places[MetadataIndex(NAME, offsets)] = _StorageInfo(FILE, begin, file.tell() - begin)
    entry = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    return CheckpointIndex({NAME: entry}, places, {})


def read(folder: Path, index: CheckpointIndex, box: tuple[slice, ...], target: Tensor) -> int:
    offsets = torch.Size(one.start for one in box)
    found = overlaps(index, NAME, offsets, target.shape)
    return sum(fill_from_part(target[inside], folder, NAME, part, where) for part, where, inside in found)


CASES = {
    "a matrix": (torch.float32, [[200], [300]]),
    "a matrix in parts": (torch.bfloat16, [[50, 150], [100, 120, 80]]),
    "layers and experts before": (torch.float64, [[1, 1, 1], [2, 2], [30], [20, 20]]),
    "a vector": (torch.float16, [[100, 1, 27]]),
    "numbers": (torch.int64, [[7], [5]]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_box_has_the_values_of_the_tensor(case: str, tmp_path: Path) -> None:
    dtype, cuts = CASES[case]
    shape = [sum(sizes) for sizes in cuts]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(251).to(dtype)
    index, moments = write(tmp_path, whole, cuts), random.Random(0)
    for _ in range(20):
        ends = [sorted(moments.sample(range(size + 1), 2)) for size in shape]
        box = tuple(slice(*pair) for pair in ends)
        for target in (
            torch.empty_like(whole[box]),
            torch.empty_like(whole[box], dtype=torch.float64),
            torch.empty([2 * size for size in whole[box].shape], dtype=dtype)[tuple(slice(None, None, 2) for _ in box)],
        ):
            read(tmp_path, index, box, target)
            assert torch.equal(target, whole[box].to(target.dtype)), box


@needs_parts_of_files
def test_only_the_bytes_of_the_box_are_read(tmp_path: Path) -> None:
    whole = torch.randn(64, 256)
    index = write(tmp_path, whole, [[64], [256]])
    for box in ((slice(8, 16), slice(0, 256)), (slice(0, 64), slice(64, 128)), (slice(3, 4), slice(5, 6))):
        target = torch.empty(whole[box].shape)
        assert read(tmp_path, index, box, target) == target.nbytes
    # Rows of 16 bytes would be as many requests: the part comes whole.
    target = torch.empty(64, 4)
    assert read(tmp_path, index, (slice(0, 64), slice(0, 4)), target) == whole.nbytes
    assert torch.equal(target, whole[:, :4])


def test_a_matrix_that_was_saved_by_columns_comes_out_right(tmp_path: Path) -> None:
    whole = torch.randn(40, 70)
    index = write(tmp_path, whole, [[40], [30, 40]], transposed=True)
    box = (slice(5, 35), slice(10, 60))
    target = torch.empty(30, 50)
    read(tmp_path, index, box, target)
    assert torch.equal(target, whole[box])


def test_a_tensor_of_one_number_has_no_offsets(tmp_path: Path) -> None:
    index, target = write(tmp_path, torch.tensor(3.0), []), torch.zeros(())
    assert read(tmp_path, index, (), target) == 4
    assert target == 3


def test_a_pytorch_that_does_not_tell_where_values_lie_reads_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(64, 256)
    index, target = write(tmp_path, whole, [[64], [256]]), torch.empty(8, 256)
    load = torch.load

    def forgetful(*arguments: object, **options: object) -> Tensor:
        tensor: Tensor = load(*arguments, **options)
        return torch.empty_like(tensor) if tensor.is_meta else tensor

    monkeypatch.setattr(torch, "load", forgetful)
    assert read(tmp_path, index, (slice(8, 16), slice(0, 256)), target) == whole.nbytes
    assert torch.equal(target, whole[8:16])


def test_what_is_not_as_the_index_says_is_refused(tmp_path: Path) -> None:
    whole = torch.randn(64, 256)
    index, target, everything = (
        write(tmp_path, whole, [[64], [256]]),
        torch.empty(64, 256),
        (slice(0, 64), slice(0, 256)),
    )
    ((part, where, _),) = overlaps(index, NAME, torch.Size((0, 0)), whole.shape)
    lost = CheckpointIndex(index.tensors, {}, {})
    with pytest.raises(ModelError, match=r"does not say where 'weight' lies"):
        read(tmp_path, lost, everything, target)
    write(tmp_path, whole.T, [[256], [64]])
    with pytest.raises(ModelError, match=r"'weight' in it is damaged: it has shape \[256, 64\], expected \[64, 256\]"):
        fill_from_part(target, tmp_path, NAME, part, where)
    (tmp_path / FILE).unlink()
    with pytest.raises(ModelError, match=r"__0_0\.distcp, which holds 'weight', cannot be read: .*No such file"):
        fill_from_part(target, tmp_path, NAME, part, where)


@pytest.mark.parametrize("above", [False, True])
def test_a_legacy_checkpoint_is_called_that(above: bool, tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000100"
    (iteration / "mp_rank_00_000").mkdir(parents=True)
    (iteration / "mp_rank_01_000").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(ModelError, match=r"is a legacy checkpoint .* mp_rank_00_000 and 1 more"):
        find_iteration(tmp_path if above else iteration)
