"""Documents written in every format of calibration data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megascore.config import DataConfig
from megascore.data import Samples, load_samples

__all__ = ["DOCUMENTS", "END", "START", "load", "order", "save_tokenizer", "words", "write", "write_megatron"]

END, START = 50, 51
DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7, 8], [], [9], [10, 11, 12, 13, 14, 15, 16, 17, 18], [19, 20]]
"""Token ids; their texts are made of words that are tokens."""


def save_tokenizer(folder: Path) -> None:
    """One token for each word; a text begins with <s> and, where texts are joined, ends with </s>."""
    vocabulary = {f"w{number}": number for number in range(END)} | {"</s>": END, "<s>": START, "?": 52}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def words(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def write(name: str, folder: Path, documents: list[list[int]]) -> dict[str, Any]:
    """Write documents in one format; return the keys of the config that name them."""
    if name.startswith("jsonl"):
        values = documents if name.endswith("ids") else [words(ids) for ids in documents]
        path = folder / "documents.jsonl"
        path.write_text("".join(json.dumps({"meta": 1, "body": value}) + "\n" for value in values))
        return {"jsonl": str(path), "field": "body"}
    if name.startswith("dataset"):
        try:
            import datasets
        except ImportError as error:
            pytest.skip(f"the package datasets (extra 'data') can't be imported: {error}")
        values = documents if name.endswith("ids") else [words(ids) for ids in documents]
        datasets.Dataset.from_dict({"body": values, "meta": list(range(len(values)))}).save_to_disk(folder / "saved")
        return {"dataset": str(folder / "saved"), "field": "body"}
    if name == "megatron":
        write_megatron(folder / "indexed", documents)
        return {"megatron": str(folder / "indexed")}
    np.save(folder / "ids.npy", np.array(documents, dtype=np.uint16))
    return {"tokens": str(folder / "ids.npy")}


def write_megatron(prefix: Path, documents: list[list[int]], dtype: type[np.number[Any]] = np.uint16) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def load(keys: dict[str, Any], tokenizer_dir: Path | None = None, **more: Any) -> Samples:
    seed = more.pop("seed", 0)
    return load_samples(DataConfig(**keys, **{"sequence_length": 4, **more}), tokenizer_dir, seed)


def order(number: int, seed: int = 0) -> list[int]:
    """The documents' order; it is the seed's alone."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
