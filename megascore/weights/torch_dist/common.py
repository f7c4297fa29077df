"""The unsharded values of a checkpoint, such as Megatron's ``args``, read without running their pickle.

Up to Megatron-Core 0.18 they are a file of their own, ``common.pt``; from 0.19 on an entry among the weights.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascore.errors import ModelError
from megascore.weights.torch_dist.index import CheckpointIndex
from megascore.weights.torch_dist.inert import inert_class

__all__ = ["CommonState", "read_common"]

FILE = "common.pt"
ENTRY = "common_state/shard_0_1"
"""Megatron's name for the one part of an unsharded object."""


@dataclass(frozen=True)
class CommonState:
    """Unsharded values; objects of classes other than plain data are inert."""

    values: Mapping[str, Any]
    where: str
    """File, and entry in it, for errors."""


def read_common(folder: Path, index: CheckpointIndex) -> CommonState:
    """Read the common state of a checkpoint, wherever its version of Megatron keeps it.

    Raises:
        ModelError: it is in neither place, or cannot be read so.
    """
    path, place = folder / FILE, index.objects.get(ENTRY)
    # Megatron, too, reads the file where there is one.
    if path.is_file():
        where, values = str(path), _read(path, str(path))
    elif place is not None:
        where = f"'{ENTRY}' in {folder / place.relative_path}"
        parts = _read(folder / place.relative_path, where, place.offset, place.length)
        # Megatron keeps a list of all the parts that a rank has of an object.
        values = parts[0] if isinstance(parts, list) and len(parts) == 1 else parts
    else:
        raise ModelError(f"{path} not found, nor '{ENTRY}' in .metadata: the checkpoint is incomplete.")
    if not isinstance(values, dict):
        raise ModelError(f"{where} holds {type(values).__name__}, expected a dict.")
    return CommonState(values, where)


def _read(path: Path, where: str, offset: int = 0, length: int = -1) -> Any:
    """Return what ``torch.save`` wrote into some bytes of a file; to its end with a negative length."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
        names = torch.serialization.get_unsafe_globals_in_checkpoint(content)
        content.seek(0)
        stand_ins = [(inert_class(name), name) for name in names]
        with torch.serialization.safe_globals([(argparse.Namespace, "argparse.Namespace"), *stand_ins]):
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise nearly anything.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {refused[1]}, which is never run" if refused else str(error).split("\n")[0]
        raise ModelError(f"{where} cannot be read: {what}.") from error
