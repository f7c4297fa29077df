"""A Hugging Face checkpoint: a model's config and its tensors, checked against each other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megascore.errors import ModelError
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.dims import sizes_of
from megascore.weights.huggingface.folder import WeightsFolder
from megascore.weights.huggingface.names import BASE_MODEL
from megascore.weights.huggingface.sources import all_tensors, as_stored, is_known_extra, names_of
from megascore.weights.huggingface.tensors import EMBEDDING, HEAD, Source

__all__ = ["HuggingFaceCheckpoint", "PartReader"]

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class PartReader(Protocol):
    """Reads parts of a checkpoint's tensors."""

    def __call__(
        self, source: Source, dim: int | None, part: int, num_parts: int, *, size: int | None = None
    ) -> Tensor:
        """Return one of equal parts of a source along a dimension; all of it where ``dim`` is None.

        Args:
            source: What is meant; where it is one expert of many in a tensor, ``dim`` is a dimension of that expert.
            dim: Dimension to cut; ``num_parts`` divides it, unless ``size`` is given.
            part: Number of the part.
            num_parts: Number of parts.
            size: Of each part, where they are more than the source together: the last ones are shorter, or empty.

        Returns:
            A vector or a matrix.
        """


class HuggingFaceCheckpoint:
    """The weights of one model. Files are looked at when something is asked of them first, and then known."""

    def __init__(self, config: HuggingFaceModelConfig, directory: str | Path) -> None:
        """Open nothing yet.

        Args:
            config: The model, as `read_config` returns it.
            directory: Folder with its safetensors files.
        """
        self._config = config
        self._directory = directory

    @cached_property
    def folder(self) -> WeightsFolder:
        """The files.

        Raises:
            ModelError: there are none, or one is missing or damaged.
        """
        return WeightsFolder(self._directory)

    @cached_property
    def config(self) -> HuggingFaceModelConfig:
        """The model as these files store it.

        Raises:
            ModelError: as `folder`.
        """
        return as_stored(self._config, self.folder.tensors)

    def check(self, *, warn: bool = True) -> None:
        """Check that all tensors of the model are there, from the headers alone; warn of tensors that it has not.

        Of tied embeddings that are stored twice the values are compared, too.

        Args:
            warn: Whether to warn; a caller that refuses such tensors says so itself.

        Raises:
            ModelError: a tensor is missing, or has another shape or type than the config says, or as `folder`.
        """
        needed, sizes = all_tensors(self.config), sizes_of(self.config)
        for source in needed.values():
            self._check_tensor(source.name, [sizes[dim] for dim in source.dims])
        extra = sorted(
            name for name in self.folder.tensors if name not in needed and not is_known_extra(name, self.config)
        )
        embedding = self.config.stored_names.get(EMBEDDING.name, EMBEDDING.name)
        if self.config.tied_embeddings and embedding != HEAD.name and HEAD.name in self.folder.tensors:
            self._check_tied(embedding)
        if extra and warn:
            logger.warning("%s: %d tensors are not used, such as %s", self._directory, len(extra), ", ".join(extra[:5]))

    def fingerprint(self) -> str:
        """Return what tells these weights from others, see `WeightsFolder`."""
        return self.folder.fingerprint()

    @contextmanager
    def reading(self) -> Iterator[PartReader]:
        """Yield a function that reads parts of sources; files are open inside. Only after `check`.

        Raises:
            ModelError: a file has gone or changed since then.
        """
        with self.folder.reading() as read:

            def read_part(
                source: Source, dim: int | None, part: int, num_parts: int, *, size: int | None = None
            ) -> Tensor:
                shape = self.folder.tensors[source.name].shape
                share = read(source.name, _ranges(shape, source, dim, (part, num_parts), size))
                return share.flatten(0, -2) if share.dim() > 2 else share

            yield read_part

    def _check_tied(self, embedding_name: str) -> None:
        embedding, head = (self.folder.tensors[name] for name in (embedding_name, HEAD.name))
        same = tuple(embedding.shape) == tuple(head.shape)
        with self.folder.reading() as read:
            for start in range(0, embedding.shape[0] if same else 0, ROWS_AT_ONCE):
                rows = (slice(start, min(start + ROWS_AT_ONCE, embedding.shape[0])), slice(0, embedding.shape[1]))
                same = same and torch.equal(read(embedding_name, rows), read(HEAD.name, rows))
        if not same:
            raise ModelError(
                f"checkpoint {self._directory}: config.json says tie_word_embeddings=true, but '{HEAD.name}' is not "
                f"'{embedding_name}', so which one the model was trained with can't be told. Set tie_word_embeddings "
                f"to false to use both, or take '{HEAD.name}' out of the files."
            )

    def _check_tensor(self, name: str, shape: list[int]) -> None:
        stored = self.folder.tensors.get(name)
        if stored is None:
            names = names_of(name, self.config)
            others = {*names, *(own.removeprefix(f"{BASE_MODEL}.") for own in names)} - {name}
            looked = f" (nor as {', '.join(sorted(others))})" if others else ""
            raise ModelError(
                f"checkpoint {self._directory} has no tensor '{name}' of shape {shape}, which its config.json "
                f"calls for{looked}: the checkpoint is incomplete, or of another model."
            )
        if list(stored.shape) != shape:
            raise ModelError(
                f"tensor '{name}' in {stored.path} has shape {list(stored.shape)}, expected {shape} "
                "by the sizes in config.json."
            )
        if stored.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"tensor '{name}' in {stored.path} has type {stored.dtype}, expected one of {', '.join(FLOAT_DTYPES)}: "
                "quantized checkpoints are not supported."
            )


def _ranges(
    shape: tuple[int, ...], source: Source, dim: int | None, part: tuple[int, int], size: int | None
) -> tuple[slice, ...]:
    """Return where in a tensor of this shape the part of a source lies: which of how many, each of a size if given."""
    ranges = [slice(0, length) for length in shape]
    for position, (number, total) in enumerate(source.parts):
        ranges[position] = _cut(ranges[position], number, (ranges[position].stop - ranges[position].start) // total)
    if dim is not None:
        # The leading dimension of experts in one tensor is no dimension of one expert.
        position = dim + 1 if source.parts else dim
        whole = ranges[position]
        ranges[position] = _cut(whole, part[0], (whole.stop - whole.start) // part[1] if size is None else size)
    return tuple(ranges)


def _cut(whole: slice, number: int, size: int) -> slice:
    start = min(whole.start + number * size, whole.stop)
    return slice(start, min(start + size, whole.stop))
