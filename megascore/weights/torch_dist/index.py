"""The index of a distributed checkpoint: the place of each part of each tensor, read without running its pickle."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

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
from megascore.weights.torch_dist.inert import InertRecord, inert_class

__all__ = ["CheckpointIndex", "StoredPart", "read_index"]

INERT_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.", "pathlib")
"""Modules whose classes may stand in the index; they are never imported for it."""
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class StoredPart:
    """A part of a tensor as it was saved."""

    offsets: torch.Size
    sizes: torch.Size
    place: _StorageInfo | None
    """File and bytes; None where the index does not tell."""


@dataclass(frozen=True)
class CheckpointIndex:
    """Tensors of a checkpoint with the places of their parts, and the places of objects that are no tensors."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, _StorageInfo]
    """File and bytes of each part of a tensor, by its name and offset."""
    objects: Mapping[str, _StorageInfo]
    """File and bytes of each object that is no tensor, by its name; each was written by ``torch.save``."""
    _boxes: dict[str, tuple[Tensor, Tensor, list[StoredPart]]] = field(default_factory=dict)

    def boxes_of(self, name: str) -> tuple[Tensor, Tensor, list[StoredPart]]:
        """Return where each stored part of a tensor begins and ends in it, [parts, dims] int64, and the parts."""
        if name not in self._boxes:
            entry = self.tensors[name]
            parts = [
                StoredPart(chunk.offsets, chunk.sizes, self.places.get(MetadataIndex(name, chunk.offsets)))
                for chunk in entry.chunks
            ]
            shape = (len(parts), len(entry.size))
            begins = torch.tensor([part.offsets for part in parts], dtype=torch.int64).reshape(shape)
            sizes = torch.tensor([part.sizes for part in parts], dtype=torch.int64).reshape(shape)
            self._boxes[name] = begins, begins + sizes, parts
        return self._boxes[name]


def read_index(path: Path) -> CheckpointIndex:
    """Read the ``.metadata`` of a checkpoint that torch.distributed.checkpoint wrote.

    It is a pickle. Nothing that it names is imported or called: its objects become inert records.

    Raises:
        ModelError: unreadable, or it names a class that has no place there, or a file outside of its folder.
    """
    try:
        with path.open("rb") as file:
            root = _InertUnpickler(file, path).load()
    except ModelError:
        raise
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise ModelError(f"{path} cannot be read as the index of a checkpoint: {error!r}") from error
    entries = root.get("state_dict_metadata") if isinstance(root, InertRecord) else None
    places = root.get("storage_data") if isinstance(root, InertRecord) else None
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ModelError(f"{path} is no index of a torch.distributed.checkpoint: it names no tensors or no files.")
    try:
        tensors = {name: _tensor(entry) for name, entry in entries.items() if _is_tensor(entry)}
        found = [(_part(key), _place(value, path)) for key, value in places.items()]
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: an entry is not as torch.distributed.checkpoint writes it: {error!r}") from error
    places = {part: place for part, place in found if part.fqn in tensors}
    return CheckpointIndex(tensors, places, {part.fqn: place for part, place in found if part.fqn not in tensors})


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._classes: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._classes:
            self._classes[full_name] = self._stand_in(module, name)
        return self._classes[full_name]

    def _stand_in(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        full_name = f"{module}.{name}"
        if full_name == "torch.Size":
            return tuple
        if full_name == "collections.OrderedDict":
            return OrderedDict
        if full_name == "torch.serialization._get_layout" or module.startswith(INERT_MODULES):
            return inert_class(full_name)
        raise ModelError(
            f"{self._path} names {full_name}, which has no place in the index of a checkpoint: it was not read."
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ModelError(f"{self._path} refers to something outside of it, {pid!r}: it was not read.")


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, InertRecord) and entry.pickled_name.endswith(".TensorStorageMetadata")


def _tensor(entry: InertRecord) -> TensorStorageMetadata:
    # TensorProperties pickles as a tuple, its dtype first.
    dtype = entry.get("properties").state[0]
    assert isinstance(dtype, torch.dtype), dtype
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.get("offsets")), torch.Size(chunk.get("sizes")))
        for chunk in entry.get("chunks")
    ]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry.get("size")), chunks)


def _part(key: InertRecord) -> MetadataIndex:
    name = key.get("fqn")
    assert isinstance(name, str), name
    return MetadataIndex(name, key.get("offset"))


def _place(value: InertRecord, path: Path) -> _StorageInfo:
    file, offset, length = (value.get(field) for field in ("relative_path", "offset", "length"))
    assert isinstance(file, str), file
    assert isinstance(offset, int), offset
    assert isinstance(length, int), length
    if Path(file).name != file:
        raise ModelError(f"{path} names the file '{file}': expected files of its own folder only.")
    if value.get("transform_descriptors"):
        raise ModelError(f"{path}: '{file}' is compressed or transformed, which is not supported.")
    return _StorageInfo(file, offset, length)
