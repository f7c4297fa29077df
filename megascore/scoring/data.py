"""Calibration data: one text file, tokenized by the model's own tokenizer and packed to samples of one length.

Samples and their order depend on the text, the tokenizer, the length and the seed, never on the parallel layout.
Nothing here talks to other ranks.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megascore.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Samples",
    "check_enough_samples",
    "check_equal_shares",
    "load_samples",
    "micro_batches_of_step",
    "num_steps",
]

logger = logging.getLogger(__name__)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Samples:
    """Calibration samples in the order in which they are used."""

    tokens: Tensor
    """[num_samples, sequence_length] int64 token ids, without padding."""
    fingerprint: str
    """SHA-256 over the shape and the token ids in order."""
    source: str
    """The text file, as it was given."""
    num_available_samples: int
    """Whole samples in the text, used or not."""
    num_dropped_tokens: int
    """Tokens at the end of the text that do not fill a sample."""


def load_samples(
    text_path: str | Path,
    tokenizer_dir: str | Path,
    sequence_length: int,
    num_samples: int | None = None,
    seed: int = 0,
) -> Samples:
    """Tokenize a text, cut it into samples and put them in the order that the seed gives.

    The text is tokenized as a whole, so no token is cut where a piece would have ended, and without special tokens:
    a sample is a window on running text.

    Args:
        text_path: UTF-8 text file; a byte order mark at its start is left out.
        tokenizer_dir: Hugging Face folder with the model's tokenizer files; nothing is downloaded.
        sequence_length: Tokens of one sample.
        num_samples: Samples to take, spread over the whole text; None takes all.
        seed: Seed of the order, at least 0.

    Returns:
        The samples; equal arguments give equal samples on every machine with the same version of torch.

    Raises:
        DataError: the text is missing, not UTF-8, or holds too few samples.
        ModelError: transformers is not installed, or the folder has no tokenizer that it can load.
    """
    text = _read_text(Path(text_path))
    token_ids = _tokenize(text, _load_tokenizer(Path(tokenizer_dir)))
    num_available, num_dropped = divmod(len(token_ids), sequence_length)
    if num_available == 0:
        raise DataError(
            f"text {text_path} has {len(token_ids)} tokens, fewer than one sample of data.sequence_length="
            f"{sequence_length}: give a longer text or a smaller data.sequence_length."
        )
    if num_samples is not None and num_samples > num_available:
        raise DataError(
            f"data.num_samples is {num_samples}, but text {text_path} has {len(token_ids)} tokens, which is "
            f"{num_available} samples of {sequence_length}: give a longer text, or at most {num_available} samples."
        )
    if num_dropped:
        logger.info("text %s: the last %d of %d tokens do not fill a sample", text_path, num_dropped, len(token_ids))
    in_text_order = torch.tensor(token_ids[: num_available * sequence_length]).view(num_available, sequence_length)
    order = torch.randperm(num_available, generator=torch.Generator().manual_seed(seed))
    tokens = in_text_order[order[:num_samples]].contiguous()
    return Samples(
        tokens=tokens,
        fingerprint=_fingerprint(tokens),
        source=str(text_path),
        num_available_samples=num_available,
        num_dropped_tokens=num_dropped,
    )


def num_steps(num_samples: int, global_batch_size: int) -> int:
    """Return how many steps go over all samples once; the last one may be smaller."""
    return -(-num_samples // global_batch_size)


def micro_batches_of_step(
    step: int,
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> list[slice]:
    """Return the micro-batches of one data-parallel rank in one step, as slices of the samples.

    Step ``k`` takes the samples from ``k * global_batch_size`` on, whatever the layout is. They are split over the
    ranks as evenly as possible: together the ranks take each sample exactly once. Where the number of samples does
    not divide, the last micro-batch of a rank is smaller and ranks may have different numbers of micro-batches; a
    rank has none where a step has fewer samples than there are ranks.

    Args:
        step: Counted from 0.
        num_samples: Samples of the whole run.
        global_batch_size: Samples of one step over all ranks.
        micro_batch_size: Samples of one forward pass.
        data_rank: This rank's place among the data-parallel ranks.
        data_size: Number of data-parallel ranks.
    """
    first = min(step * global_batch_size, num_samples)
    num_here = min(first + global_batch_size, num_samples) - first
    local_first = first + num_here * data_rank // data_size
    local_end = first + num_here * (data_rank + 1) // data_size
    return [
        slice(start, min(start + micro_batch_size, local_end))
        for start in range(local_first, local_end, micro_batch_size)
    ]


def check_enough_samples(num_samples: int, data_size: int) -> None:
    """Refuse a run in which a data-parallel rank would have nothing to do.

    Raises:
        DataError: there are fewer samples than data-parallel ranks.
    """
    if num_samples < data_size:
        raise DataError(
            f"{num_samples} samples for {data_size} data-parallel ranks: each rank needs at least one. Use more text, "
            f"a smaller data.sequence_length, or a larger parallel.tensor or parallel.pipeline."
        )


def check_equal_shares(num_samples: int, global_batch_size: int, data_size: int) -> None:
    """Refuse a run in which data-parallel ranks would have different numbers of samples in some step.

    Needed where they exchange tokens in every forward pass, as experts that are spread over them do: a rank with one
    micro-batch more would wait for the others forever.

    Raises:
        DataError: steps, or the samples of the last one, do not split evenly.
    """
    if global_batch_size % data_size or num_samples % data_size:
        below = num_samples // data_size * data_size
        raise DataError(
            f"{num_samples} samples in steps of {global_batch_size} do not split evenly over {data_size} data-parallel "
            f"ranks, which parallel.expert needs: choose a run.global_batch_size that is a multiple of {data_size}, "
            f"and data.num_samples={below or data_size}."
        )


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"text {path} cannot be read: {error.strerror}. data.text names a UTF-8 file.") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text {path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} ({error.reason}). "
            f"Convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} not found: model.hf names a Hugging Face checkpoint directory.")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(
            f"model folder {folder} has no tokenizer, none of {', '.join(VOCABULARY_FILES)}: "
            f"copy the tokenizer files of the model into it."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"the tokenizer in {folder} needs transformers ({error}): run pip install 'megascore[huggingface]'."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # The Rust tokenizers raise bare Exception for a damaged file.
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Quiet, because the text as a whole is longer than the model's context: it is cut into samples afterwards.
    encoding = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    token_ids: list[int] = encoding["input_ids"]
    return token_ids


def _fingerprint(tokens: Tensor) -> str:
    # Little-endian, so that machines of either kind agree.
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode())
    digest.update(tokens.numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()
