"""Tensors of a checkpoint folder, read one by one when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascore.errors import ModelError

__all__ = ["CheckpointFolder"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointFolder:
    """The ``*.safetensors`` files of a folder, closed between reads so that nothing of them stays in memory."""

    def __init__(self, folder: str | Path) -> None:
        """Find the files: those of the index if there is one, else ``model.safetensors``, else all.

        Raises:
            ModelError: there are none.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            names = sorted(set(self._index().values()))
        elif (self.folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise ModelError(f"weights folder {folder} has no *.safetensors files: name a checkpoint directory.")
        self._paths = [self.folder / name for name in names]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name.

        Raises:
            ModelError: a file is missing or damaged.
        """
        return {name: shape for name, (_, shape) in self._entries.items()}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU, in the dtype of the file.

        They may be views of the file, which is read when they are, and is let go with them.

        Raises:
            ModelError: a file has gone or changed since it was looked at.
        """
        tensors: dict[str, Tensor] = {}
        path = self.folder
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            try:
                for name in names:
                    path, shape = self._entries[name]
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensors[name] = files[path].get_tensor(name)
                    if tuple(tensors[name].shape) != shape:
                        raise ModelError(f"{path}: {name} has changed its shape while it was in use.")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}. Take a good copy.") from error
        return tensors

    @cached_property
    def _entries(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        entries: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in self._paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        entries[name] = path, tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}. Take a good copy.") from error
        return entries

    def _index(self) -> Mapping[str, str]:
        try:
            weight_map = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ModelError(f"{self.folder / INDEX} is no index of weights ({error!r}). Take a good copy.") from error
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(
                f"{self.folder / INDEX} is no index of weights: its weight_map is not one of tensor names to file "
                "names. Take a good copy."
            )
        return weight_map


def find_name(wanted: Sequence[str], prefix: str, names: Mapping[str, torch.Size | tuple[int, ...]]) -> str | None:
    """Return which of a tensor's names a checkpoint has; a base model is saved without its prefix, or with it."""
    for name in wanted:
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in names:
                return candidate
    return None
