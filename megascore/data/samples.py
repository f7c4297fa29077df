"""Samples of one length, and which of their tokens are real."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Samples", "fingerprint"]


@dataclass(frozen=True)
class Samples:
    """Calibration samples in the order in which they are used."""

    tokens: Tensor
    """[num_samples, sequence_length] int64 token ids; 0 where there is padding."""
    fingerprint: str
    """SHA-256 over the shape and the token ids in order, and over the masks where there are some."""
    source: str
    """What they come from, as it was given: "text words.txt"."""
    masks: Tensor | None = None
    """[num_samples, sequence_length] bool, False for padding; None: nothing is padded."""


def fingerprint(tokens: Tensor, masks: Tensor | None) -> str:
    """Return what `Samples.fingerprint` holds; the same on machines of either byte order."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode())
    # A view of the tensor itself: the samples may be most of what the host's memory holds.
    digest.update(np.ascontiguousarray(tokens.numpy().astype("<i8", copy=False)).data)
    if masks is not None:
        digest.update(np.packbits(masks.numpy()).tobytes())
    return digest.hexdigest()
