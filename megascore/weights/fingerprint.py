"""Samples of a file's bytes, which tell one checkpoint's weights from another's without reading all of them."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

__all__ = ["sampled_digest"]

SAMPLE_BYTES = 4096
"""Bytes read at the start, middle and end of each tensor's data."""


def sampled_digest(file: BinaryIO, begin: int, end: int) -> str:
    """Return a SHA-256 over samples at the start, middle and end of a range of bytes."""
    digest = hashlib.sha256()
    for position in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
        file.seek(position)
        digest.update(file.read(min(SAMPLE_BYTES, end - position)))
    return digest.hexdigest()
