"""Token ids are those of tokenizer.json, also where transformers builds another tokenizer from it. Tier: pure."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megascore.data.encoder import Encoder
from megascore.errors import DataError, ModelError
from tests.data.data_files import load

TEXT = "The cat sat on the mat, and 1234 birds sang.\nThe other cat's mat was on the other side of the wall."
PRE_TOKENIZERS: dict[str, Any] = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    # Qwen2's own pattern is another.
    "bytes by another pattern": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
CLASSES = {
    "llama": {"tokenizer_class": "LlamaTokenizer"},
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer"},
    "as it is": {"tokenizer_class": "PreTrainedTokenizerFast"},
}


def save(folder: Path, pre_tokenizer: str, family: str, *, start: bool = True, **settings: Any) -> Tokenizer:
    """Put a byte-level tokenizer into the folder of a model; return it as the file has it."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # Settings of a file that are of no account here.
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", **CLASSES[family], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    model_type = "llama" if family == "as it is" else family
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer.no_truncation()
    return tokenizer


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_the_ids_are_the_files_and_special_tokens_as_transformers_puts_them(
    pre_tokenizer: str, family: str, tmp_path: Path
) -> None:
    own = save(tmp_path, pre_tokenizer, family)
    text = own.encode(TEXT, add_special_tokens=False).ids
    assert own.decode(text) == TEXT
    assert Encoder(tmp_path, packing=True).running_text(TEXT).tolist() == text
    assert Encoder(tmp_path, packing=True).document(TEXT, "here").tolist() == [*text, 1]
    around = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)("a").input_ids[:-1]
    assert Encoder(tmp_path, packing=False).document(TEXT, "here").tolist() == [*around, *text]


def test_a_tokenizer_that_transformers_builds_otherwise_is_warned_of_with_both_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = save(tmp_path, "bytes by another pattern", "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    same = tokenizer(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT, add_special_tokens=False).ids
    with caplog.at_level(logging.WARNING, logger="megascore"):
        encoder = Encoder(tmp_path, packing=True)
        for _ in range(2):
            encoder.document(TEXT, "here")
    records = [record.getMessage() for record in caplog.records if record.name.startswith("megascore")]
    # Whether the two differ is up to the version of transformers.
    assert len(records) == (0 if same else 1)
    for message in records:
        assert "tokenizer.json, and [" in message
        assert "megascore takes the file's" in message
        assert "PreTrainedTokenizerFast.from_pretrained(folder)" in message
        as_it_is = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
        assert as_it_is(TEXT, add_special_tokens=False).input_ids == own.encode(TEXT, add_special_tokens=False).ids


class OtherTokenizer:
    """What transformers may load: a tokenizer that loses every space, of Rust or of Python."""

    eos_token_id = 1

    def __init__(self, own: Tokenizer, backend: Tokenizer | None) -> None:
        self._own = own
        if backend is not None:
            self.backend_tokenizer = backend

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._own.encode(text.replace(" ", ""), add_special_tokens=False).ids}

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._own.id_to_token(token)


@pytest.mark.parametrize("in_rust", [True, False])
def test_a_tokenizer_that_loses_every_space_gives_the_files_ids_or_is_refused(
    in_rust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = save(tmp_path, "bytes", "llama")
    other = OtherTokenizer(own, own if in_rust else None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    encoder = Encoder(tmp_path, packing=True)
    place = r"' cat sat on .*' \(character 3, token 1\) begins with ids \[.*\] by .*tokenizer\.json, and \[.*\] by"
    if not in_rust:
        with pytest.raises(ModelError, match=place + r".*can't be told.*data\.tokens.*PreTrainedTokenizerFast"):
            encoder.running_text(TEXT)
        return
    with caplog.at_level(logging.WARNING, logger="megascore"):
        assert encoder.running_text(TEXT).tolist() == own.encode(TEXT, add_special_tokens=False).ids
    assert "' cat sat on" in caplog.text
    assert "(character 3, token 1)" in caplog.text


@pytest.mark.parametrize("adds_start", [True, False])
def test_a_start_that_only_transformers_or_only_the_file_has_stays_as_transformers_puts_it(
    adds_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers 5.24 takes the file's in either case; others go by add_bos_token of tokenizer_config.json.
    own = save(tmp_path / "of the file", "bytes", "llama", start=not adds_start)
    backend = save(tmp_path / "of transformers", "bytes", "llama", start=adds_start)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: OtherTokenizer(own, backend))
    ids = Encoder(tmp_path / "of the file", packing=False).document(TEXT, "here").tolist()
    assert ids == [0] * adds_start + own.encode(TEXT, add_special_tokens=False).ids


def test_a_tokenizer_that_is_the_files_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "bytes", "as it is")
    with caplog.at_level(logging.WARNING, logger="megascore"):
        Encoder(tmp_path, packing=True).document(TEXT, "here")
    assert not caplog.records


def test_special_tokens_that_the_file_does_not_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "bytes", "as it is", eos_token="<end>")
    encoder = Encoder(tmp_path, packing=True)
    with pytest.raises(ModelError, match=r"takes for the end of a text the token '<end>' with id \d+.*is no token"):
        encoder.document(TEXT, "here")
    save(tmp_path, "bytes", "llama")
    other = save(tmp_path / "other", "bytes", "llama")
    other.add_special_tokens(["<start>"])
    start = other.token_to_id("<start>")
    other.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", start)])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: OtherTokenizer(other, other))
    with pytest.raises(ModelError, match=rf"puts around a text the token '<start>' with id {start}.*is no token"):
        Encoder(tmp_path, packing=False).document(TEXT, "here")


@pytest.mark.parametrize("packing", [True, False])
def test_where_no_text_becomes_tokens_the_tokenizer_is_to_blame(
    packing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    documents, text = tmp_path / "documents.jsonl", tmp_path / "text.txt"
    blame = r"tokenizer in .* makes no tokens of any text, such as 'bcd' .*not at fault.*data\.tokenizer"
    documents.write_text('{"text": "bcd"}\n' * 3)
    with pytest.raises(ModelError, match=blame):
        load({"jsonl": str(documents)}, tmp_path, packing=packing)
    text.write_text("bcd")
    with pytest.raises(ModelError, match=blame):
        load({"text": str(text)}, tmp_path)
    # One text that becomes nothing is told, and with others too short the data is to blame.
    caplog.clear()
    documents.write_text('{"text": "bcd"}\n{"text": "aaaa"}\n')
    assert load({"jsonl": str(documents)}, tmp_path, packing=packing).tokens.tolist() == [[0, 0, 0, 0]]
    assert "makes no tokens of 'bcd'" in caplog.text
    documents.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="fewer than one sample"):
        load({"jsonl": str(documents)}, tmp_path, packing=packing)
