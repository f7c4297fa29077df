"""Every format of calibration data gives the same samples, in the seed's order, and reads no more than it uses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascore.data.megatron import MegatronDataset
from megascore.errors import ConfigError, DataError
from tests.data.data_files import DOCUMENTS, END, START, load, order, words, write, write_megatron

FORMATS = ("jsonl", "jsonl ids", "dataset", "dataset ids", "megatron", "tokens")
ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
"""Documents of one length, as an array has them."""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 5])
def test_packed_documents_follow_each_other_in_the_seeds_order(
    name: str, seed: int, tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = ROWS if name == "tokens" else DOCUMENTS
    caplog.set_level(logging.INFO, logger="megascore")
    samples = load(write(name, tmp_path, documents), tokenizer_dir, seed=seed)
    # What is tokenized here gets an end-of-text token; ids are taken as they are.
    end = [END] if name in ("jsonl", "dataset") else []
    joined = [token for number in order(len(documents), seed) if documents[number] for token in documents[number] + end]
    assert samples.tokens.flatten().tolist() == joined[: len(joined) // 4 * 4]
    assert samples.masks is None
    num_left = len(joined) % 4
    assert (f"the last {num_left} of {len(joined)} tokens do not fill a sample" in caplog.text) == bool(num_left)


@pytest.mark.parametrize("name", FORMATS)
def test_padded_documents_are_a_sample_each_in_the_seeds_order(
    name: str, tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megascore")
    documents = ROWS if name == "tokens" else DOCUMENTS
    samples = load(write(name, tmp_path, documents), tokenizer_dir, packing=False, seed=3)
    begin = [START] if name in ("jsonl", "dataset") else []
    wanted = [begin + documents[number] for number in order(len(documents), 3) if documents[number]]
    assert samples.masks is not None
    assert samples.tokens.shape == samples.masks.shape == (len(wanted), 4)
    for ids, row, mask in zip(wanted, samples.tokens.tolist(), samples.masks.tolist(), strict=True):
        num_real = min(4, len(ids))
        assert row == ids[:4] + [0] * (4 - num_real)
        assert mask == [True] * num_real + [False] * (4 - num_real)
    assert int(samples.masks.sum()) == sum(min(4, len(ids)) for ids in wanted)
    num_left = sum(max(0, len(ids) - 4) for ids in wanted)
    assert (f"{num_left} tokens beyond data.sequence_length=4 are left out" in caplog.text) == bool(num_left)


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
    with pytest.raises(ConfigError, match="no borders between documents"):
        load({"tokens": str(tmp_path / "stream.npy")}, packing=False)


def test_a_file_larger_than_what_is_taken_is_not_read_whole(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "large.npy"
    # 2 GiB on paper, without blocks on the disk.
    np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(1 << 28,)).flush()
    tracemalloc.start()
    try:
        samples = load({"tokens": str(path)}, sequence_length=1 << 16, num_samples=4)
        # What numpy takes: two copies of the samples, 2 MiB each.
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert samples.tokens.shape == (4, 1 << 16)


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
