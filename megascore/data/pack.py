"""Packing: streams and documents become samples of one length, in the seed's order, reading no more than is used.

The order is decided before anything is read, so fewer samples are the beginning of more:

- of a stream, its windows are put in the seed's order;
- documents are put in the seed's order, and then joined and cut (packed), or cut and filled up one by one (padded).
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from megascore.data.samples import Samples, fingerprint
from megascore.data.source import Documents, Stream, TokenIds
from megascore.errors import DataError

__all__ = ["pack_documents", "pack_stream", "pad_documents"]

logger = logging.getLogger(__name__)


def pack_stream(stream: Stream, length: int, num_samples: int | None, seed: int) -> Samples:
    """Cut a stream into windows and take some of them, spread over all of it.

    Args:
        stream: The tokens.
        length: Tokens of a sample.
        num_samples: Samples to take; None takes all.
        seed: Seed of the order.

    Raises:
        DataError: the stream is too short.
    """
    num_available, num_dropped = divmod(len(stream.ids), length)
    _check_enough(stream.name, f"{len(stream.ids)} tokens", num_available, length, num_samples)
    if num_dropped:
        logger.info("%s: the last %d of %d tokens do not fill a sample", stream.name, num_dropped, len(stream.ids))
    windows = stream.ids[: num_available * length].reshape(num_available, length)
    order = _order(num_available, seed)[:num_samples]
    # Indexing copies what is taken, and only that, out of a file in memory.
    tokens = _tensor(windows[order.numpy()], stream.name)
    return Samples(tokens, fingerprint(tokens, None), stream.name)


def pack_documents(documents: Documents, length: int, num_samples: int | None, seed: int) -> Samples:
    """Join documents in the seed's order, and cut them into samples until there are enough.

    The arguments are those of `pack_stream`.

    Raises:
        DataError: the documents are too short together, or one of them cannot be used.
    """
    wanted = None if num_samples is None else num_samples * length
    parts: list[TokenIds] = []
    num_tokens = num_read = 0
    for number in _order(len(documents), seed).tolist():
        if wanted is not None and num_tokens >= wanted:
            break
        ids = documents.tokens(number)
        parts.append(ids[: None if wanted is None else wanted - num_tokens])
        num_tokens += len(parts[-1])
        num_read += 1
    num_here, num_dropped = divmod(num_tokens, length)
    _check_enough(documents.name, f"{num_read} documents, {num_tokens} tokens", num_here, length, num_samples)
    if num_dropped:
        logger.info("%s: the last %d of %d tokens do not fill a sample", documents.name, num_dropped, num_tokens)
    tokens = _tensor(np.concatenate(parts)[: num_here * length].reshape(num_here, length), documents.name)
    return Samples(tokens, fingerprint(tokens, None), documents.name)


def pad_documents(documents: Documents, length: int, num_samples: int | None, seed: int) -> Samples:
    """Make a sample of each document in the seed's order: its beginning, filled up on the right.

    Documents without tokens are left out. The arguments are those of `pack_stream`.

    Raises:
        DataError: there are too few documents, or one of them cannot be used.
    """
    rows: list[TokenIds] = []
    num_read = num_dropped = 0
    for number in _order(len(documents), seed).tolist():
        if len(rows) == num_samples:
            break
        ids = documents.tokens(number)
        num_read += 1
        if len(ids):
            rows.append(ids[:length])
            num_dropped += len(ids) - len(rows[-1])
    _check_enough(documents.name, f"{num_read} documents, {len(rows)} with tokens", len(rows), length, num_samples)
    if num_dropped:
        logger.info("%s: %d tokens beyond data.sequence_length=%d are left out", documents.name, num_dropped, length)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    masks = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, ids in enumerate(rows):
        tokens[number, : len(ids)] = _tensor(ids, documents.name)
        masks[number, : len(ids)] = True
    return Samples(tokens, fingerprint(tokens, masks), documents.name, masks)


def _order(number: int, seed: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def _tensor(ids: TokenIds, name: str) -> Tensor:
    """Return token ids as int64; the data is a copy."""
    tokens = torch.from_numpy(np.array(ids, dtype=np.int64))
    if tokens.numel() and int(tokens.min()) < 0:
        raise DataError(f"{name} holds {int(tokens.min())}: expected token ids, which are 0 or larger.")
    return tokens


def _check_enough(name: str, content: str, num_available: int, length: int, num_samples: int | None) -> None:
    if num_available == 0:
        raise DataError(
            f"{name} has {content}, fewer than one sample of data.sequence_length={length}: "
            "give more data or a smaller data.sequence_length."
        )
    if num_samples is not None and num_samples > num_available:
        raise DataError(
            f"data.num_samples is {num_samples}, but {name} has {content}, which is {num_available} samples of "
            f"{length}: give more data, or at most {num_available} samples."
        )
