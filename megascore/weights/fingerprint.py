"""A short text that tells one checkpoint's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

__all__ = ["sampled_digest", "weights_fingerprint"]

SAMPLE_BYTES = 4096
"""Bytes read at the start, middle and end of each tensor's data."""


def weights_fingerprint(folder: str | Path) -> str:
    """Return a SHA-256 over names, types, shapes and samples of the bytes of all tensors in a checkpoint folder.

    The same weights give the same text however the tensors are spread over files. Training changes every part of every
    tensor, so samples tell; a change made to a few values by hand may go unseen.

    Args:
        folder: Holds ``*.safetensors`` files that safetensors itself has accepted.
    """
    entries = [entry for path in sorted(Path(folder).glob("*.safetensors")) for entry in _tensor_entries(path)]
    digest = hashlib.sha256()
    for entry in sorted(entries):
        digest.update(entry)
    return digest.hexdigest()


def _tensor_entries(path: Path) -> list[bytes]:
    """Return one text for each tensor of a file; the format is at https://github.com/huggingface/safetensors."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        start_of_data = 8 + header_size
        entries = []
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = (start_of_data + offset for offset in tensor["data_offsets"])
            entries.append(f"{name} {tensor['dtype']} {tensor['shape']} {sampled_digest(file, begin, end)}".encode())
        return entries


def sampled_digest(file: BinaryIO, begin: int, end: int) -> str:
    """Return a SHA-256 over samples at the start, middle and end of a range of bytes."""
    digest = hashlib.sha256()
    for position in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
        file.seek(position)
        digest.update(file.read(min(SAMPLE_BYTES, end - position)))
    return digest.hexdigest()
