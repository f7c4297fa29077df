"""The form of all files that this package writes for itself: tensors, a JSON text, and a checksum over both.

It is a safetensors file whose metadata has one entry: the JSON text, under a name that tells what kind of file it is.
The same content gives the same bytes. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megascore.files.json_text import parse_json

__all__ = ["DamagedFile", "ForeignFile", "decode", "encode", "json_text"]

_CHECKSUM = "sha256"


class DamagedFile(ValueError):  # noqa: N818 - the two names say what was found
    """The bytes are not what was written; the text says in what way, as a sentence whose subject is the file."""

    def __init__(self, reason: str, content: Any = None) -> None:
        """Keep the JSON content, where it could be read: what it says can't be trusted."""
        super().__init__(reason)
        self.content = content


class ForeignFile(ValueError):  # noqa: N818
    """A safetensors file of another kind."""


def encode(kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a file.

    Args:
        kind: Name of the metadata entry.
        content: JSON-able, without the key ``sha256``.
        tensors: On the CPU, contiguous.

    Raises:
        TypeError, ValueError: the content can't be written as JSON.
    """
    with_checksum = {**content, _CHECKSUM: _checksum(content, tensors)}
    return save(dict(tensors), metadata={kind: json_text(with_checksum)})


def decode(kind: str, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return content and tensors of what `encode` returned.

    Raises:
        DamagedFile: not whole, changed, or no safetensors file.
        ForeignFile: no file of this kind.
    """
    try:
        # The format is at https://github.com/huggingface/safetensors; `load` checks it, but leaves out the metadata.
        metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        tensors = load(data)
    except (SafetensorError, ValueError, AttributeError, KeyError, RuntimeError, MemoryError) as error:
        raise DamagedFile(f"can't be read as safetensors ({error})") from error
    if not isinstance(metadata, dict) or kind not in metadata:
        raise ForeignFile(f"its metadata has no '{kind}'")
    try:
        content = parse_json(metadata[kind])
        expected = content.pop(_CHECKSUM)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"has unreadable metadata ({error!r})") from error
    if _checksum(content, tensors) != expected:
        raise DamagedFile("doesn't match its own checksum", content)
    return content, tensors


def json_text(content: Any) -> str:
    """Return JSON that is the same for the same content.

    Raises:
        TypeError, ValueError: something has no form in JSON.
    """
    return json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _checksum(content: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json_text(content).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\0{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
