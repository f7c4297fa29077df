"""Weights of a Megatron checkpoint into models of any layout, each rank reading only the values that it has.

Megatron's own loader unpickles the index, and needs all ranks at once. Here Megatron says which part of which tensor
each parameter is (``sharded_state_dict``); `read` finds and reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megascore.errors import ModelError
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint
from megascore.weights.torch_dist.read import fill_from_part, overlaps

__all__ = ["TorchDistWeights"]

LAYER_NUMBER = re.compile(r"^decoder\.layers\.(\d+)\.")
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass
class _Wanted:
    """The part of a global tensor that this rank has."""

    name: str
    """Name of the tensor in the checkpoint."""
    offsets: torch.Size
    target: Tensor
    """Filled with the part; it has as many dimensions as the global tensor."""


@dataclass(frozen=True)
class TorchDistWeights:
    """The weights in a Megatron checkpoint, saved from a model of the same make in any layout."""

    whole_because = None

    checkpoint: MegatronCheckpoint

    def check(self) -> None:
        """Check that the files are there and whole."""
        self.checkpoint.check_files()

    def load(self, chunks: Sequence[nn.Module]) -> int:
        """Fill the chunks of this rank, built inside a `parallel_world`, see `Weights`. Not collective.

        Parameters on the meta device are checked like the others, and not read.

        Raises:
            ModelError: a tensor that the model has is not there or has another shape, one that is there is not the
                model's, or a file is damaged. It names the tensor.
        """
        num_bytes = 0
        for chunk in chunks:
            sharded = chunk.sharded_state_dict(metadata=self.checkpoint.naming)  # type: ignore[operator]
            _check_unused(sharded, self.checkpoint)
            num_bytes += sum(_load_value(value, self.checkpoint) for value in _values(sharded))
        return num_bytes

    def load_layer(self, chunk: nn.Module, layer: nn.Module) -> int:
        """Fill one decoder layer of a chunk, see `Weights`; only its own tensors are looked at."""
        sharded = _sharded_layer(chunk, layer, self.checkpoint)
        return sum(_load_value(value, self.checkpoint) for value in _values(sharded))

    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        return self.checkpoint.fingerprint()


def _sharded_layer(chunk: nn.Module, layer: nn.Module, checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Return Megatron's description of a layer's parameters; it has one of blocks only, so the block has one layer."""
    name, block = next((name, block) for name, block in chunk.named_modules() if isinstance(block, TransformerBlock))
    layers = block.layers
    block.layers = nn.ModuleList([layer])
    try:
        sharded = block.sharded_state_dict(prefix=f"{name}.", metadata=checkpoint.naming)
    finally:
        block.layers = layers
    return {key: value for key, value in sharded.items() if key.startswith(f"{name}.layers.")}


def _values(sharded: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(sharded, dict):
        for value in sharded.values():
            yield from _values(value)
    elif isinstance(sharded, (list, tuple)):
        for value in sharded:
            yield from _values(value)
    elif isinstance(sharded, (ShardedTensor, ShardedTensorFactory)):
        yield sharded


def _load_value(value: ShardedTensor | ShardedTensorFactory, checkpoint: MegatronCheckpoint) -> int:
    """Load one parameter: in place, unless Megatron saves it in a form that is no part of it."""
    if isinstance(value, ShardedTensor):
        return _read(_wanted(value, checkpoint), checkpoint)
    built = value.build()
    parts = [_wanted(part, checkpoint) for part in _values(built)]
    num_bytes = sum(_read(part, checkpoint) for part in parts)
    is_copy = any(_storage(part.target) != _storage(value.data) for part in parts)
    if is_copy and not value.data.is_meta:
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
    return _Wanted(name, torch.Size(part.global_offset), target)


def _read(part: _Wanted, checkpoint: MegatronCheckpoint) -> int:
    entry = checkpoint.index.tensors[part.name]
    found = list(overlaps(checkpoint.index, part.name, part.offsets, part.target.shape))
    covered = sum(part.target[inside].numel() for _, _, inside in found)
    extents = zip(part.offsets, part.target.shape, entry.size, strict=True)
    num_stored = prod(max(min(start + extent, size) - start, 0) for start, extent, size in extents)
    if covered < num_stored:
        raise ModelError(
            f"checkpoint {checkpoint.folder} holds {covered} of the {num_stored} values at "
            f"{list(part.offsets)} of '{part.name}' that this rank has: parts of the tensor were not saved."
        )
    if num_stored < part.target.numel():
        # The vocabulary is padded further here than where it was saved: entries that no token has.
        part.target.zero_()
    if part.target.is_meta:
        return 0
    return sum(
        fill_from_part(part.target[inside], checkpoint.folder, part.name, stored, where)
        for stored, where, inside in found
    )


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
