"""Every format of calibration data gives the same samples, reads what it uses, and names what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megascore.errors import ConfigError, DataError, MegascoreError
from megascore.scoring.config import DataConfig
from megascore.scoring.data import Samples, check_source, load_samples
from megascore.scoring.data.megatron import MegatronDataset

END, START = 50, 51
DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7, 8], [], [9], [10, 11, 12, 13, 14, 15, 16, 17, 18], [19, 20]]
"""Token ids; their texts are made of words that are tokens."""
FORMATS = ("jsonl", "jsonl ids", "dataset", "dataset ids", "megatron", "tokens")
ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
"""Documents of one length, as an array has them."""


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """One token for each word; a text begins with <s> and, where texts are joined, ends with </s>."""
    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = {f"w{number}": number for number in range(END)} | {"</s>": END, "<s>": START, "?": 52}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


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
        datasets = pytest.importorskip("datasets", reason="the package datasets (extra 'data') is not installed")
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 5])
def test_packed_documents_follow_each_other_in_the_seeds_order(
    name: str, seed: int, tmp_path: Path, tokenizer_dir: Path
) -> None:
    documents = ROWS if name == "tokens" else DOCUMENTS
    samples = load(write(name, tmp_path, documents), tokenizer_dir, seed=seed)
    # What is tokenized here gets an end-of-text token; ids are taken as they are.
    end = [END] if name in ("jsonl", "dataset") else []
    joined = [token for number in order(len(documents), seed) if documents[number] for token in documents[number] + end]
    assert samples.tokens.flatten().tolist() == joined[: len(joined) // 4 * 4]
    assert samples.masks is None
    assert (samples.num_available_samples, samples.num_dropped_tokens) == divmod(len(joined), 4)


@pytest.mark.parametrize("name", FORMATS)
def test_padded_documents_are_a_sample_each_in_the_seeds_order(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    documents = ROWS if name == "tokens" else DOCUMENTS
    samples = load(write(name, tmp_path, documents), tokenizer_dir, packing=False, seed=3)
    begin = [START] if name in ("jsonl", "dataset") else []
    # A tokenizer that begins a text with a token does so for an empty one, too.
    wanted = [begin + documents[number] for number in order(len(documents), 3)]
    wanted = [ids for ids in wanted if ids]
    assert samples.masks is not None
    assert samples.tokens.shape == samples.masks.shape == (len(wanted), 4)
    for ids, row, mask in zip(wanted, samples.tokens.tolist(), samples.masks.tolist(), strict=True):
        num_real = min(4, len(ids))
        assert row == ids[:4] + [0] * (4 - num_real)
        assert mask == [True] * num_real + [False] * (4 - num_real)
    assert samples.num_tokens(slice(None)) == sum(min(4, len(ids)) for ids in wanted)
    assert samples.num_tokens(slice(0, 2)) == sum(min(4, len(ids)) for ids in wanted[:2])
    assert samples.num_dropped_tokens == sum(max(0, len(ids) - 4) for ids in wanted)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_fewer_samples_are_the_beginning_of_more(name: str, packing: bool, tmp_path: Path, tokenizer_dir: Path) -> None:
    keys = write(name, tmp_path, ROWS if name == "tokens" else DOCUMENTS)
    whole = load(keys, tokenizer_dir, packing=packing)
    fewer = load(keys, tokenizer_dir, packing=packing, num_samples=2)
    assert torch.equal(fewer.tokens, whole.tokens[:2])
    assert fewer.fingerprint != whole.fingerprint
    more = len(whole.tokens) + 1
    with pytest.raises(DataError, match=f"num_samples is {more}, but .* which is {more - 1} samples of 4"):
        load(keys, tokenizer_dir, packing=packing, num_samples=more)


def test_documents_that_no_sample_needs_are_not_looked_at(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "documents.jsonl"
    lines = ["broken"] * 6
    for number in order(6)[:2]:
        lines[number] = json.dumps({"text": words([7] * 5)})
    path.write_text("\n".join(lines))
    for packing in (True, False):
        assert len(load({"jsonl": str(path)}, tokenizer_dir, num_samples=2, packing=packing).tokens) == 2
        with pytest.raises(DataError, match=r"jsonl line \d is not JSON"):
            load({"jsonl": str(path)}, tokenizer_dir, num_samples=4, packing=packing)


def test_a_stream_of_tokens_is_cut_into_windows_spread_over_all_of_it(tmp_path: Path) -> None:
    np.save(tmp_path / "stream.npy", np.arange(22, dtype=np.int32))
    samples = load({"tokens": str(tmp_path / "stream.npy")}, seed=2)
    assert samples.tokens.tolist() == [list(range(4 * window, 4 * window + 4)) for window in order(5, 2)]
    assert (samples.num_available_samples, samples.num_dropped_tokens) == (5, 2)
    with pytest.raises(ConfigError, match="no borders between documents"):
        load({"tokens": str(tmp_path / "stream.npy")}, packing=False)


def test_a_file_larger_than_what_is_taken_is_not_read_whole(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "large.npy"
    # 2 GiB on paper, without blocks on the disk.
    np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(1 << 28,)).flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = load({"tokens": str(path)}, sequence_length=1 << 16, num_samples=4)
    assert samples.num_available_samples == 1 << 12
    # KiB: the order of the windows and the samples themselves.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_the_mask_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for name, documents in (("zeros", [[1, 2, 0, 0]]), ("padding", [[1, 2]])):
        write_megatron(tmp_path / name, documents)
        prints |= {load({"megatron": str(tmp_path / name)}, packing=False).fingerprint}
    assert len(prints) == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_the_reader_of_indexed_datasets_reads_as_megatrons_own(dtype: type[np.number[Any]], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path / 'own'}.bin", dtype=dtype)
    for ids in DOCUMENTS:
        # Several sequences to a document.
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids) // 2, len(ids) - len(ids) // 2])
    builder.finalize(f"{tmp_path / 'own'}.idx")
    wanted, own = IndexedDataset(str(tmp_path / "own")), MegatronDataset(tmp_path / "own")
    assert len(own) == len(wanted.document_indices) - 1 == len(DOCUMENTS)
    for number, ids in enumerate(DOCUMENTS):
        sequences = range(wanted.document_indices[number], wanted.document_indices[number + 1])
        theirs = np.concatenate([wanted[sequence] for sequence in sequences])
        assert own.tokens(number).tolist() == theirs.tolist() == ids
        assert own.tokens(number).dtype == theirs.dtype


def test_lines_may_have_a_byte_order_mark_other_ends_and_gaps(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "w1 w2"}\r\n\r\n{"text": "w3 caf\xc3\xa9"}')
    samples = load({"jsonl": str(path)}, tokenizer_dir, packing=False)
    assert sorted(samples.tokens.tolist()) == [[START, 1, 2, 0], [START, 3, 52, 0]]


def test_a_tokenizer_of_another_folder_comes_first(tmp_path: Path, tokenizer_dir: Path) -> None:
    keys = write("jsonl", tmp_path, DOCUMENTS)
    samples = load({**keys, "tokenizer": str(tokenizer_dir)}, tmp_path / "nowhere")
    assert samples.fingerprint == load(keys, tokenizer_dir).fingerprint
    with pytest.raises(ConfigError, match=r"data\.tokenizer is not given"):
        load(keys, None)


def test_without_an_end_of_text_token_documents_just_follow_each_other(tmp_path: Path, tokenizer_dir: Path) -> None:
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = load(write("jsonl", tmp_path, DOCUMENTS), tokenizer_dir)
    assert texts.fingerprint == load(write("jsonl ids", tmp_path, DOCUMENTS)).fingerprint


BAD_LINES: dict[str, tuple[str, str]] = {
    "field missing": ('{"body": 1, "id": 2}', r"documents\.jsonl line 2: field 'text' missing; found: body, id"),
    "nothing there": ("{}", r"line 2: field 'text' missing; found: none"),
    "no text": ('{"text": 5}', r"line 2: field 'text' is int: expected a text, or a list of token ids"),
    "null": ('{"text": null}', r"line 2: field 'text' is null"),
    "no ids": ('{"text": [1, "a"]}', r"line 2: field 'text' holds 'a' in a list: expected token ids"),
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
