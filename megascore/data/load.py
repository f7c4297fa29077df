"""Loading: the ``data`` section of a config becomes samples."""

from __future__ import annotations

from pathlib import Path

from megascore.config import DataConfig
from megascore.data.dataset import DatasetFolder
from megascore.data.encoder import Encoder
from megascore.data.jsonl import JsonLines
from megascore.data.megatron import MegatronDataset
from megascore.data.pack import pack_documents, pack_stream, pad_documents
from megascore.data.samples import Samples
from megascore.data.source import Documents, Stream
from megascore.data.text import TextFile
from megascore.data.tokens import open_token_array
from megascore.errors import ConfigError, DataError

__all__ = ["check_source", "load_samples"]


def check_source(data: DataConfig) -> None:
    """Check, before anything long starts, that there is something to read. Not collective.

    Raises:
        ConfigError: no source is given.
        DataError: it does not exist.
    """
    kind, path = data.source()
    if kind == "megatron":
        for suffix in (".idx", ".bin"):
            if not Path(f"{path}{suffix}").is_file():
                raise DataError(f"{path}{suffix} not found: data.megatron names the two files without .bin and .idx.")
    elif kind == "dataset" and not Path(path).is_dir():
        raise DataError(f"dataset {path} not found: data.dataset names a folder that save_to_disk wrote.")
    elif kind != "dataset" and not Path(path).is_file():
        wanted = {"text": "a UTF-8 file", "jsonl": "a file of JSON lines", "tokens": "a .npy file"}[kind]
        raise DataError(f"{kind} {path} not found: data.{kind} names {wanted}.")


def load_samples(data: DataConfig, tokenizer_dir: str | Path | None = None, seed: int = 0) -> Samples:
    """Read data and make samples of it. Not collective.

    Args:
        data: Where it is, and how samples are made.
        tokenizer_dir: Hugging Face folder with the model's tokenizer files, used where ``data.tokenizer`` is not given;
            nothing is downloaded.
        seed: Seed of the order, at least 0.

    Returns:
        The samples; equal arguments give equal samples on every machine with the same version of torch.

    Raises:
        DataError: the data is missing, damaged or too short; names file, line and field.
        ModelError: transformers is not installed, or the folder has no tokenizer that it can load, or one that makes no
            tokens of any text.
        ConfigError: no source is given, or no tokenizer where one is needed.
    """
    encoder = Encoder(data.tokenizer or tokenizer_dir, data.packing)
    source = _open(data, encoder)
    if isinstance(source, Documents):
        make = pack_documents if data.packing else pad_documents
        try:
            return make(source, data.sequence_length, data.num_samples, seed)
        except DataError:
            # Too few tokens are the tokenizer's fault where it makes none at all.
            encoder.check_made_tokens()
            raise
    if not data.packing:
        raise ConfigError(
            f"data.packing=false makes a sample of each document, and {source.name} has no borders between documents: "
            "expected [samples, tokens], or data.packing=true."
        )
    return pack_stream(source, data.sequence_length, data.num_samples, seed)


def _open(data: DataConfig, encoder: Encoder) -> Stream | Documents:
    kind, path = data.source()
    if kind == "jsonl":
        return JsonLines(Path(path), data.field, encoder)
    if kind == "dataset":
        return DatasetFolder(Path(path), data.field, encoder)
    if kind == "megatron":
        return MegatronDataset(Path(path))
    return TextFile(Path(path), encoder) if kind == "text" else open_token_array(Path(path))
