"""Calibration data: samples are the text's own tokens, each once, in an order that only the seed decides. Pure."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megascore.config import DataConfig
from megascore.data import (
    Samples,
    check_enough_samples,
    check_equal_shares,
    micro_batches_of_step,
    num_steps,
)
from megascore.data import load_samples as load
from megascore.errors import DataError, ModelError


def load_samples(
    text_path: Path, tokenizer_dir: Path, sequence_length: int, num_samples: int | None = None, seed: int = 0
) -> Samples:
    data = DataConfig(text=str(text_path), sequence_length=sequence_length, num_samples=num_samples)
    return load(data, tokenizer_dir, seed)


WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A tokenizer with one id for each word, whose longest sequence is shorter than the texts here."""
    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = {word: place for place, word in enumerate([*WORDS, "<s>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8, "bos_token": "<s>"}'
    )
    return folder


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    """A text of 47 tokens, 0 to 46."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[:47]) + "\n")
    return path


def test_samples_hold_every_token_of_the_text_once_and_leave_out_the_rest(
    text_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="megascore"):
        samples = load_samples(text_path, tokenizer_dir, sequence_length=5)
    assert samples.tokens.dtype == torch.int64
    assert samples.tokens.shape == (9, 5)
    in_text_order = samples.tokens[samples.tokens[:, 0].argsort()]
    assert in_text_order.flatten().tolist() == list(range(45))
    assert "last 2 of 47 tokens" in caplog.text
    assert samples.source == f"text {text_path}"


def test_a_text_longer_than_the_models_context_is_no_reason_to_warn(
    text_path: Path, tokenizer_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_samples(text_path, tokenizer_dir, sequence_length=5)
    assert "longer than the specified maximum" not in capfd.readouterr().err


def test_the_order_is_the_seeds_and_fewer_samples_are_its_beginning(text_path: Path, tokenizer_dir: Path) -> None:
    whole = load_samples(text_path, tokenizer_dir, sequence_length=5, seed=3)
    again = load_samples(text_path, tokenizer_dir, sequence_length=5, seed=3)
    other = load_samples(text_path, tokenizer_dir, sequence_length=5, seed=4)
    fewer = load_samples(text_path, tokenizer_dir, sequence_length=5, num_samples=4, seed=3)
    assert torch.equal(whole.tokens, again.tokens)
    assert not torch.equal(whole.tokens, other.tokens)
    assert torch.equal(fewer.tokens, whole.tokens[:4])
    assert whole.fingerprint == again.fingerprint
    assert len({whole.fingerprint, other.fingerprint, fewer.fingerprint}) == 3


def test_the_same_tokens_cut_to_another_length_have_another_fingerprint(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "same.txt"
    path.write_text("w7 " * 12)
    cut_to_4 = load_samples(path, tokenizer_dir, sequence_length=4)
    cut_to_6 = load_samples(path, tokenizer_dir, sequence_length=6)
    assert cut_to_4.fingerprint != cut_to_6.fingerprint


def test_a_byte_order_mark_is_not_part_of_the_text(text_path: Path, tokenizer_dir: Path) -> None:
    plain = load_samples(text_path, tokenizer_dir, sequence_length=5)
    text_path.write_bytes(b"\xef\xbb\xbf" + text_path.read_bytes())
    assert load_samples(text_path, tokenizer_dir, sequence_length=5).fingerprint == plain.fingerprint


def test_too_little_text_is_refused_with_the_numbers(text_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"47 tokens.*sequence_length=48"):
        load_samples(text_path, tokenizer_dir, sequence_length=48)
    with pytest.raises(DataError, match=r"num_samples is 10.*47 tokens.*9 samples of 5"):
        load_samples(text_path, tokenizer_dir, sequence_length=5, num_samples=10)


def test_an_empty_text_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(DataError, match="0 tokens"):
        load_samples(path, tokenizer_dir, sequence_length=5)


def test_a_missing_text_is_refused_with_its_name(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
        load_samples(tmp_path / "nowhere.txt", tokenizer_dir, sequence_length=5)
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load_samples(tmp_path, tokenizer_dir, sequence_length=5)


def test_a_text_in_another_encoding_is_refused_with_the_place(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("w1 caf\u00e9 w2".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1\.txt is not UTF-8: byte 0xe9 at offset 6"):
        load_samples(path, tokenizer_dir, sequence_length=5)


def test_a_folder_without_a_tokenizer_is_refused(text_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere not found"):
        load_samples(text_path, tmp_path / "nowhere", sequence_length=5)
    with pytest.raises(ModelError, match=r"no tokenizer, none of tokenizer\.json"):
        load_samples(text_path, tmp_path, sequence_length=5)


def test_a_damaged_tokenizer_is_refused_with_its_folder(text_path: Path, tokenizer_dir: Path) -> None:
    (tokenizer_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"model cannot be loaded: "):
        load_samples(text_path, tokenizer_dir, sequence_length=5)


def test_a_tokenizer_that_is_code_of_its_own_is_refused_without_asking(text_path: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    own_code = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own_code))
    with pytest.raises(ModelError, match=r"code of its own .*not run: name a folder .*data\.tokenizer"):
        load_samples(text_path, tmp_path, sequence_length=5)


def test_without_transformers_the_error_says_what_to_install(
    text_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"megascore\[huggingface\]"):
        load_samples(text_path, tokenizer_dir, sequence_length=5)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [7, 8, 19])
def test_the_ranks_take_each_sample_of_a_step_exactly_once(
    num_samples: int, micro_batch_size: int, data_size: int
) -> None:
    global_batch_size = 8
    seen: list[int] = []
    for step in range(num_steps(num_samples, global_batch_size)):
        of_step: list[int] = []
        for data_rank in range(data_size):
            for part in micro_batches_of_step(
                step, num_samples, global_batch_size, micro_batch_size, data_rank, data_size
            ):
                taken = list(range(num_samples))[part]
                assert 1 <= len(taken) <= micro_batch_size
                of_step += taken
        # The samples of a step do not depend on the layout.
        assert of_step == list(range(step * global_batch_size, min((step + 1) * global_batch_size, num_samples)))
        seen += of_step
    assert seen == list(range(num_samples))


def test_the_ranks_of_a_step_differ_by_one_sample_at_most() -> None:
    sizes = [
        sum(part.stop - part.start for part in micro_batches_of_step(0, 100, 8, 4, data_rank, 3))
        for data_rank in range(3)
    ]
    assert sorted(sizes) == [2, 3, 3]


def test_a_step_after_the_end_is_empty() -> None:
    assert micro_batches_of_step(2, 16, 8, 1, data_rank=0, data_size=1) == []
    assert num_steps(16, 8) == 2
    assert num_steps(17, 8) == 3


def test_fewer_samples_than_data_parallel_ranks_is_refused() -> None:
    check_enough_samples(4, 4)
    with pytest.raises(DataError, match="3 samples for 4 data-parallel ranks"):
        check_enough_samples(3, 4)


def test_unequal_shares_are_refused_and_equal_ones_are_equal_in_every_step() -> None:
    for num_samples, batch in ((7, 4), (8, 5), (1, 4)):
        with pytest.raises(DataError, match=f"{num_samples} samples in steps of {batch} do not split evenly over 2"):
            check_equal_shares(num_samples, batch, 2)
    check_equal_shares(10, 4, 2)
    for step in range(num_steps(10, 4)):
        first, second = (micro_batches_of_step(step, 10, 4, 1, rank, 2) for rank in range(2))
        assert len(first) == len(second)
