"""Weights of a Megatron checkpoint into models of any layout, each rank reading only the parts that it has.

Megatron's own loader unpickles the index, and needs all ranks at once. Here Megatron says which part of which tensor
each parameter is (``sharded_state_dict``), and torch.distributed.checkpoint cuts and reads the parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megascore.errors import ModelError
from megascore.mcore.torch_dist.checkpoint import MegatronCheckpoint

__all__ = ["load_checkpoint"]

LAYER_NUMBER = re.compile(r"^decoder\.layers\.(\d+)\.")
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass
class _Wanted:
    """A part of a global tensor that this rank has."""

    name: str
    """In the checkpoint."""
    offsets: torch.Size
    global_shape: torch.Size
    target: Tensor
    """Where it goes, with as many dimensions as the global tensor."""
    may_differ: bool
    """Whether the global shape may be another, as that of a padded vocabulary."""


def load_checkpoint(chunks: Sequence[nn.Module], checkpoint: MegatronCheckpoint) -> int:
    """Fill the model chunks of this rank.

    Not collective. Every rank checks the files of the whole checkpoint before any weight is read.

    Args:
        chunks: Of this rank, built inside a `parallel_world`.
        checkpoint: Saved from a model of the same make, in any layout.

    Returns:
        Bytes read by this rank.

    Raises:
        ModelError: a tensor that the model has is not there or has another shape, one that is there is not the model's,
            or a file is missing or damaged. It names the tensor.
    """
    checkpoint.check_files()
    reader = FileSystemReader(checkpoint.folder)
    reader.storage_data = dict(checkpoint.index.places)
    num_bytes = 0
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint.naming)  # type: ignore[operator]
        _check_unused(sharded, checkpoint)
        for value in _values(sharded):
            num_bytes += _load_value(value, checkpoint, reader)
    return num_bytes


def _values(sharded: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(sharded, dict):
        for value in sharded.values():
            yield from _values(value)
    elif isinstance(sharded, (list, tuple)):
        for value in sharded:
            yield from _values(value)
    elif isinstance(sharded, (ShardedTensor, ShardedTensorFactory)):
        yield sharded


def _load_value(
    value: ShardedTensor | ShardedTensorFactory, checkpoint: MegatronCheckpoint, reader: FileSystemReader
) -> int:
    """Load one parameter: in place, unless Megatron saves it in a form that is no part of it."""
    if isinstance(value, ShardedTensor):
        return _read([_wanted(value, checkpoint)], checkpoint, reader)
    built = value.build()
    parts = [_wanted(part, checkpoint) for part in _values(built)]
    num_bytes = _read(parts, checkpoint, reader)
    if any(_storage(part.target) != _storage(value.data) for part in parts):
        with torch.no_grad():
            value.data.copy_(value.merge_fn(_data_of(built)))
    return num_bytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _data_of(built: Any) -> Any:
    if isinstance(built, dict):
        return {key: _data_of(value) for key, value in built.items()}
    if isinstance(built, (list, tuple)):
        return [_data_of(value) for value in built]
    return built.data if isinstance(built, ShardedTensor) else built


def _wanted(part: ShardedTensor, checkpoint: MegatronCheckpoint) -> _Wanted:
    name = checkpoint.prefix + part.key
    shape = torch.Size(part.global_shape)
    entry = checkpoint.index.tensors.get(name)
    if entry is None:
        raise ModelError(
            f"checkpoint {checkpoint.folder} has no tensor '{name}' of shape {list(shape)}, which the model has: it is "
            "of another model."
        )
    if entry.size != shape and not (part.allow_shape_mismatch and len(entry.size) == len(shape)):
        raise ModelError(
            f"tensor '{name}' in checkpoint {checkpoint.folder} has shape {list(entry.size)}, expected {list(shape)}, "
            "as the model has: it is of another model."
        )
    target = part.data.detach()[(None,) * part.prepend_axis_num]
    return _Wanted(name, torch.Size(part.global_offset), shape, target, bool(part.allow_shape_mismatch))


def _read(parts: Sequence[_Wanted], checkpoint: MegatronCheckpoint, reader: FileSystemReader) -> int:
    by_file: dict[str, list[ReadItem]] = defaultdict(list)
    num_bytes = 0
    for part in parts:
        items = _read_items(part, checkpoint)
        for item in items:
            place = checkpoint.index.places.get(item.storage_index)
            if place is None:
                raise ModelError(f"{checkpoint.folder}/.metadata does not say where '{part.name}' lies.")
            by_file[place.relative_path].append(item)
            num_bytes += place.length
    planner = _Planner(parts)
    for name, items in by_file.items():
        _read_file(checkpoint.folder / name, LoadPlan(items), planner, reader)
    return num_bytes


def _read_items(part: _Wanted, checkpoint: MegatronCheckpoint) -> list[ReadItem]:
    local = ChunkStorageMetadata(part.offsets, part.target.shape)
    entry = checkpoint.index.tensors[part.name]
    items: list[ReadItem] = create_read_items_for_chunk_list(part.name, entry, [local])
    covered = sum(item.lengths.numel() for item in items)
    if covered < part.target.numel():
        if not part.may_differ or entry.size == part.global_shape:
            raise ModelError(
                f"checkpoint {checkpoint.folder} holds {covered} of the {part.target.numel()} values at "
                f"{list(part.offsets)} of '{part.name}' that this rank has: parts of the tensor were not saved."
            )
        # Padding of the vocabulary: entries that no token has.
        part.target.zero_()
    return items


def _read_file(path: Path, plan: LoadPlan, planner: LoadPlanner, reader: FileSystemReader) -> None:
    try:
        # Tensors are read by torch.load(weights_only=True).
        reader.read_data(plan, planner).wait()
    except Exception as error:  # Damaged bytes raise nearly anything.
        names = sorted({item.storage_index.fqn for item in plan.items})
        raise ModelError(f"{path} cannot be read: '{names[0]}' in it is damaged: {error}") from error


class _Planner(LoadPlanner):
    """Hands out where the tensors that are read go."""

    def __init__(self, parts: Sequence[_Wanted]) -> None:
        self._targets = {MetadataIndex(part.name, part.offsets): part.target for part in parts}

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._targets[read_item.dest_index]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was copied into place already."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """There is nothing to plan with other ranks."""

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("this planner is given its plan")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("this planner is given its plan")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are read")


def _check_unused(sharded: Any, checkpoint: MegatronCheckpoint) -> None:
    """Refuse layers with more in the checkpoint than in the model: biases, a norm, experts that it was trained with."""
    parts = [
        part
        for value in _values(sharded)
        for part in (_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value])
    ]
    own = {_without_expert(part.key) for part in parts}
    numbered = {match[0] for name in own if (match := LAYER_NUMBER.match(name))}
    # Without numbers, a rank that has any layer has a part of every tensor of layers.
    has_layers = any(name.startswith("decoder.layers.") for name in own)
    ours = [*numbered] if numbered or not has_layers else ["decoder.layers."]
    if any(name.startswith("decoder.final_layernorm.") for name in own):
        ours += ["decoder.final_layernorm.", "output_layer."]
    for name in checkpoint.weights:
        if name.startswith(tuple(ours)) and _without_expert(name) not in own:
            raise ModelError(
                f"checkpoint {checkpoint.folder} has a tensor '{name}', which the model does not have: it is of "
                "another model."
            )


def _without_expert(name: str) -> str:
    return EXPERT_NUMBER.sub(".experts.", name)
