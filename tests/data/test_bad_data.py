"""Faults in calibration data are named: file, line, field, and what was found instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascore.config import DataConfig
from megascore.data import check_source, load_samples
from megascore.errors import ConfigError, DataError, MegascoreError
from tests.data.data_files import DOCUMENTS, load, words, write, write_megatron

BAD_LINES: dict[str, tuple[str, str]] = {
    "field missing": ('{"body": 1, "id": 2}', r"documents\.jsonl line 2: field 'text' missing; found: body, id"),
    "nothing there": ("{}", r"line 2: field 'text' missing; found: none"),
    "no text": ('{"text": 5}', r"line 2: field 'text' is int: expected a text, or a list of token ids"),
    "null": ('{"text": null}', r"line 2: field 'text' is null"),
    "no ids": ('{"text": [1, "a"]}', r"line 2: field 'text' holds 'a' in a list: expected token ids"),
    "larger than any": (
        f'{{"text": [1, {2**70}]}}',
        rf"documents\.jsonl line 2: field 'text' holds {2**70} in a list, which no token id",
    ),
    "no JSON": ('{"text": w}', r"line 2 is not JSON: Expecting value at column 10"),
    "no object": ("[1]", r"line 2 holds list: expected a JSON object"),
    "another encoding": ('{"text": "caf\udce9"}', r"line 2 is not UTF-8: byte 0xe9 at offset 13 of the line"),
    "negative ids": ('{"text": [1, -1]}', r"documents\.jsonl holds -1: expected token ids, which are 0 or larger"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_field(case: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    line, message = BAD_LINES[case]
    path = tmp_path / "documents.jsonl"
    good = json.dumps({"text": words([1, 2, 3, 4])})
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    for packing in (True, False):
        with pytest.raises(DataError, match=message):
            load({"jsonl": str(path)}, tokenizer_dir, packing=packing)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def patch(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


BAD_INDEXED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda f: (f / "d.idx").unlink(), r"d\.idx cannot be read: No such file"),
    "no data": (lambda f: (f / "d.bin").unlink(), r"d\.bin cannot be read: No such file"),
    "another file": (
        lambda f: patch(f / "d.idx", 0, b"x"),
        r"d\.idx is no index of a Megatron dataset: it begins",
    ),
    "empty": (lambda f: cut(f / "d.idx", 0), r"no index of a Megatron dataset"),
    "version": (lambda f: patch(f / "d.idx", 9, b"\2"), r"is of version 2: expected 1"),
    "floats": (lambda f: patch(f / "d.idx", 17, b"\7"), r"type float32, expected token ids"),
    "unknown type": (lambda f: patch(f / "d.idx", 17, b"\x63"), r"type number 99, expected token ids"),
    "index cut off": (lambda f: cut(f / "d.idx", 80), r"d\.idx has 80 bytes, but 6 sequences in 6 documents need 162"),
    "data cut off": (lambda f: cut(f / "d.bin", 10), r"d\.bin has 5 tokens of type uint16, but its index goes to 20"),
    "other bounds": (lambda f: patch(f / "d.idx", 154, b"\5"), r"bounds run from 0 to 5, expected .* 0 to 6"),
}


@pytest.mark.parametrize("case", BAD_INDEXED)
def test_a_damaged_indexed_dataset_is_refused(case: str, tmp_path: Path) -> None:
    damage, message = BAD_INDEXED[case]
    write_megatron(tmp_path / "d", DOCUMENTS)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load({"megatron": str(tmp_path / "d")})


BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "floats": (np.zeros(9), r"holds float64 \[9\]: expected whole numbers"),
    "three dimensions": (np.zeros((2, 3, 4), dtype=np.int64), r"holds int64 \[2, 3, 4\]"),
    "truth values": (np.zeros(9, dtype=bool), r"holds bool \[9\]"),
    "objects": (np.array([[1], [2, 3]], dtype=object), r"is no \.npy file of numbers: .*objects"),
    "negative": (np.full(9, -7), r"holds -7: expected token ids"),
    "too short": (np.arange(3), r"has 3 tokens, fewer than one sample of data\.sequence_length=4"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_array_that_holds_no_token_ids_is_refused(case: str, tmp_path: Path) -> None:
    array, message = BAD_ARRAYS[case]
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(DataError, match=message):
        load({"tokens": str(tmp_path / "ids.npy")})


def test_what_is_no_array_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("w1 w2")
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "several.npz", a=np.arange(9))
    for name, message in (("text.npy", "is no .npy file"), ("empty.npy", "is no .npy"), ("several.npz", "several")):
        with pytest.raises(DataError, match=message):
            load({"tokens": str(tmp_path / name)})


def test_bad_datasets_are_refused_with_what_was_found(tmp_path: Path, tokenizer_dir: Path) -> None:
    keys = write("dataset", tmp_path, DOCUMENTS)
    datasets = sys.modules["datasets"]
    with pytest.raises(DataError, match=r"saved: column 'text' missing; found: body, meta"):
        load({**keys, "field": "text"}, tokenizer_dir)
    with pytest.raises(DataError, match=r"saved row \d: column 'meta' is int: expected a text"):
        load({**keys, "field": "meta"}, tokenizer_dir)
    splits = datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "saved"))})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds the splits train: .*data\.dataset=.*splits/train"):
        load({"dataset": str(tmp_path / "splits"), "field": "body"}, tokenizer_dir)
    with pytest.raises(DataError, match=r"model cannot be loaded: "):
        load({"dataset": str(tokenizer_dir)}, tokenizer_dir)


def test_without_the_package_datasets_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"megascore\[data\]"):
        load({"dataset": str(tmp_path)})


@pytest.mark.parametrize("kind", ["text", "jsonl", "dataset", "megatron", "tokens"])
def test_a_source_that_is_not_there_is_found_out_early(kind: str, tmp_path: Path) -> None:
    data = DataConfig(**{kind: str(tmp_path / "nowhere")})
    for look in (check_source, lambda data: load_samples(data, tmp_path)):
        with pytest.raises(DataError, match="nowhere"):
            look(data)
    write_megatron(tmp_path / "there", DOCUMENTS)
    check_source(DataConfig(megatron=str(tmp_path / "there")))


BAD_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "two sources": ({"text": "a", "tokens": "b"}, r"data\.text and data\.tokens are given: expected one"),
    "a padded text": ({"text": "a", "packing": False}, r"data\.text is one document"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_keys_that_contradict_each_other_are_refused(case: str) -> None:
    keys, message = BAD_KEYS[case]
    with pytest.raises(ConfigError, match=message):
        DataConfig(**keys)


def test_no_source_is_refused_with_those_there_are() -> None:
    with pytest.raises(MegascoreError, match=r"data\.text, data\.jsonl, data\.dataset, data\.megatron, data\.tokens"):
        load({})
