"""Weights of a Hugging Face checkpoint into Megatron models, each rank reading only its share."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open

from megascore.errors import ModelError
from megascore.process.closing import Closing
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.tensors import (
    Found,
    Rule,
    Source,
    all_sources,
    find_rule,
    has_fused_experts,
    is_known_extra,
    sizes_of,
    sources_of,
    weave,
)

__all__ = ["Checkpoint", "load_layer", "load_weights"]

logger = logging.getLogger(__name__)

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint(Closing):
    """The safetensors files of a checkpoint directory, open for reading parts of tensors."""

    def __init__(self, directory: str | Path) -> None:
        """Find the files and read their headers, no weights.

        Raises:
            ModelError: no safetensors file, a file missing or damaged.
        """
        self.directory = Path(directory)
        self.num_bytes_read = 0
        self._files = ExitStack()
        self._reader_of: dict[str, tuple[Path, Any]] = {}
        for path in _weight_files(self.directory):
            try:
                reader = self._files.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read as a safetensors file: {error}") from error
            self._reader_of.update(dict.fromkeys(reader.keys(), (path, reader)))

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def check(self, config: HuggingFaceModelConfig) -> None:
        """Check that all tensors of a model are there, with the right shapes, from the headers alone.

        Raises:
            ModelError: a tensor is missing, or has another shape or type than the config says.
        """
        sizes = sizes_of(config)
        sources = all_sources(config, fused=self.has_fused_experts(config))
        needed = {source.name: tuple(sizes[size] for size in source.shape) for source in sources}
        for name, shape in needed.items():
            self.check_tensor(name, shape)
        extra = sorted(name for name in self._reader_of if name not in needed and not is_known_extra(name, config))
        if extra:
            logger.warning("%s: %d tensors are not used, such as %s", self.directory, len(extra), ", ".join(extra[:5]))

    def has_fused_experts(self, config: HuggingFaceModelConfig) -> bool:
        """Whether the experts of a layer are in one tensor, rather than each in its own."""
        return has_fused_experts(config, frozenset(self._reader_of))

    def read(self, source: Source, dim: int | None, part: int, num_parts: int) -> torch.Tensor:
        """Read one of equal parts of a source along a dimension; all of it where ``dim`` is None.

        Returns:
            A vector or a matrix: of experts in one tensor, what is meant of one of them.
        """
        part_of = self._reader_of[source.name][1].get_slice(source.name)
        shape = part_of.get_shape()
        ranges = [slice(0, size) for size in shape]
        parts = list(enumerate(source.parts))
        if dim is not None:
            # The leading dimension of experts in one tensor is no dimension of one expert.
            parts.append((dim + max(0, len(shape) - 2) if source.parts else dim, (part, num_parts)))
        for position, (number, total) in parts:
            size = (ranges[position].stop - ranges[position].start) // total
            start = ranges[position].start + number * size
            ranges[position] = slice(start, start + size)
        share: torch.Tensor = part_of[tuple(ranges)]
        self.num_bytes_read += share.nbytes
        return share.flatten(0, -2) if share.dim() > 2 else share

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor is there, with this shape, from the headers alone.

        Raises:
            ModelError: it is missing, or has another shape or type.
        """
        if name not in self._reader_of:
            raise ModelError(
                f"checkpoint {self.directory} has no tensor '{name}' of shape {list(shape)}, which its config.json "
                "calls for: the checkpoint is incomplete, or of another model."
            )
        path, reader = self._reader_of[name]
        header = reader.get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise ModelError(
                f"tensor '{name}' in {path} has shape {list(header.get_shape())}, expected {list(shape)} "
                "by the sizes in config.json."
            )
        if header.get_dtype() not in FLOAT_DTYPES:
            raise ModelError(
                f"tensor '{name}' in {path} has type {header.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}: "
                "quantized checkpoints are not supported."
            )


def load_weights(chunks: Sequence[torch.nn.Module], config: HuggingFaceModelConfig, directory: str | Path) -> int:
    """Fill the model chunks of this rank from a checkpoint, reading only what this rank needs.

    Parameters on the meta device are left out: see `load_layer`.
    Every rank checks the whole checkpoint before any weight is read, so a bad one raises the same error on all of them.

    Args:
        chunks: The ``GPTModel`` chunks of this rank.
        config: The model that the checkpoint holds.
        directory: Hugging Face checkpoint directory with safetensors files.

    Returns:
        Bytes of weights read by this rank.

    Raises:
        ModelError: no safetensors files, a tensor missing or misshapen (named), a damaged file.
    """
    with Checkpoint(directory) as checkpoint:
        checkpoint.check(config)
        fused = checkpoint.has_fused_experts(config)
        for chunk in chunks:
            for parameter, found in _parameters(chunk):
                if not parameter.is_meta:
                    sources = sources_of(found.rule, config, found.layer, _global_expert(found, config), fused=fused)
                    _fill(parameter, found.rule, sources, checkpoint, config)
        return checkpoint.num_bytes_read


def load_layer(layer: torch.nn.Module, config: HuggingFaceModelConfig, directory: str | Path) -> int:
    """Fill one decoder layer from a checkpoint, as `load_weights` does; only this layer's tensors are looked at.

    Args:
        layer: Megatron's, with its global number.
        config: The model that the checkpoint holds.
        directory: Hugging Face checkpoint directory with safetensors files.

    Returns:
        Bytes of weights read by this rank.

    Raises:
        ModelError: a tensor is missing or misshapen, or a file is damaged: it has changed since the run began.
    """
    sizes = sizes_of(config)
    with Checkpoint(directory) as checkpoint:
        fused = checkpoint.has_fused_experts(config)
        for name, parameter in layer.named_parameters():
            found = find_rule(f"decoder.layers.0.{name}")
            assert found is not None, f"no rule says where Megatron parameter '{name}' of a layer comes from"
            number: Any = layer.layer_number
            sources = sources_of(found.rule, config, number - 1, _global_expert(found, config), fused=fused)
            for source in sources:
                checkpoint.check_tensor(source.name, tuple(sizes[size] for size in source.shape))
            _fill(parameter, found.rule, sources, checkpoint, config)
        return checkpoint.num_bytes_read


def _parameters(chunk: torch.nn.Module) -> Iterator[tuple[torch.Tensor, Found]]:
    """Each parameter once, with its rule and the global number of its layer."""
    for name, parameter in chunk.named_parameters():
        found = find_rule(name)
        assert found is not None, f"no rule says where Megatron parameter '{name}' comes from"
        layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
        layer = None if found.layer is None else layers[found.layer].layer_number - 1
        yield parameter, found._replace(layer=layer)


def _global_expert(found: Found, config: HuggingFaceModelConfig) -> int | None:
    if found.expert is None:
        return None
    assert config.experts is not None
    num_local: int = config.experts.num_experts // parallel_state.get_expert_model_parallel_world_size()
    rank: int = parallel_state.get_expert_model_parallel_rank()
    return rank * num_local + found.expert


@torch.no_grad()
def _fill(
    parameter: torch.Tensor,
    rule: Rule,
    sources: tuple[Source, ...],
    checkpoint: Checkpoint,
    config: HuggingFaceModelConfig,
) -> None:
    if not sources:
        parameter.zero_()
        return
    if rule.per_expert:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        num_ranks = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    shares = [checkpoint.read(source, rule.split_dim, rank, num_ranks) for source in sources]
    if rule.per_kv_head:
        value = weave(shares, config.num_kv_heads // num_ranks)
    else:
        # The embedding is the largest, and need not be there once more.
        value = shares[0] if len(shares) == 1 else torch.cat(shares)
    assert value.shape == parameter.shape, f"{rule.parameters[0]}: {tuple(value.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(value)


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ModelError(
                f"{directory} has neither model.safetensors nor model.safetensors.index.json: expected a checkpoint "
                "in safetensors format. Save it again with transformers' save_pretrained; pickled *.bin files are "
                "never read."
            )
        return [single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} cannot be read as an index with a weight_map: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(
            f"{index} cannot be read as an index with a weight_map: expected a mapping of tensor names to file names."
        )
    names: dict[str, list[str]] = defaultdict(list)
    for tensor, file in weight_map.items():
        names[file].append(tensor)
    for file, tensors in names.items():
        if not (directory / file).is_file():
            raise ModelError(
                f"{directory / file} not found: {index.name} says that it holds {len(tensors)} tensors, "
                f"such as '{tensors[0]}'."
            )
    return [directory / file for file in sorted(names)]
