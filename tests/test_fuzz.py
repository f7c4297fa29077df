"""Files that somebody damaged: each is refused in a sentence, or read as it stands. Seeded, in one process."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megascore.config import load_config
from megascore.data.encoder import Encoder
from megascore.data.jsonl import JsonLines
from megascore.data.megatron import HEADER, MAGIC, MegatronDataset
from megascore.errors import MegascoreError
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.folder import WeightsFolder
from tests.models import SIZES

CASES = 100
DEEP = 100_000
ODD = ["text", "", "1", "false", [], [1], ["a"], {}, {"a": 1}, True, -1, 0, 1.5, -0.5, float("inf"), float("nan")]
ODD += [10**7, 10**30, 10**400, [[[[]]]], "\0", "\ud800"]
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob")
COUNTS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
NUMBERS = ("rms_norm_eps", "rope_theta")
OTHERS = ("model_type", "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "mlp_only_layers")
LENGTHS = [3, 5, 2]


def refused(read: Callable[[], Any]) -> bool:
    """Return whether reading ends in an error of ours; any other comes through and fails the test."""
    try:
        read()
    except MegascoreError:
        return True
    return False


def damage(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    kind = chance.randrange(3)
    if kind == 0:
        return content[:at]
    middle = bytes([chance.randrange(256)]) if kind == 1 else b"[" * DEEP
    return content[:at] + middle + content[at + 1 :]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_a_value_of_config_json_is_read_as_typed_or_refused(tmp_path: Path, model_type: str) -> None:
    base = {"model_type": model_type, **SIZES, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert not refused(lambda: read_config(tmp_path))
    for key in (*FLAGS, *COUNTS, *NUMBERS, *OTHERS):
        for odd in ODD:
            (tmp_path / "config.json").write_text(json.dumps({**base, "use_sliding_window": True, key: odd}))
            if refused(lambda: read_config(tmp_path)):
                continue
            model = read_config(tmp_path).architecture
            if key in COUNTS:
                assert type(odd) is int, (key, odd)
                assert 0 < odd < 2**63, (key, odd)
            if key in NUMBERS:
                found = model.gpt["rotary_base"] if key == "rope_theta" else model.transformer["layernorm_epsilon"]
                assert type(odd) in (int, float), (key, odd)
                assert isfinite(found), (key, odd)
                assert found == odd, (key, odd)
            if key == "model_type":
                assert model.model_type == odd


def test_a_damaged_config_json_ends_in_a_sentence(tmp_path: Path) -> None:
    chance = random.Random(1)
    content = json.dumps({"model_type": "llama", **SIZES}).encode()
    for _ in range(CASES):
        (tmp_path / "config.json").write_bytes(damage(content, chance))
        refused(lambda: read_config(tmp_path))


@pytest.mark.parametrize(
    "line", [b'{"text": "a \\ud800 b"}', b'{"text": ' + b"[" * DEEP, b'{"text": [' + b"1" * 5000 + b"]}", b"\xff", b"1"]
)
def test_a_line_that_no_reader_takes_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    assert refused(lambda: JsonLines(path, "text", Encoder(None, packing=True)).tokens(0))


def test_a_damaged_line_is_read_as_it_stands_or_refused(tmp_path: Path) -> None:
    chance, path = random.Random(2), tmp_path / "a.jsonl"
    for _ in range(CASES):
        line = damage(b'{"text": [1, 22, 333], "meta": "a"}', chance).replace(b"\n", b" ") or b"{"
        path.write_bytes(line)

        def read(line: bytes = line) -> None:
            found = JsonLines(path, "text", Encoder(None, packing=True)).tokens(0)
            assert found.tolist() == json.loads(line)["text"]

        refused(read)


def indexed(pointers: list[int]) -> bytes:
    arrays = np.array(LENGTHS, "<i4"), np.array(pointers, "<i8"), np.array([0, 1, 2, 3], "<i8")
    return HEADER.pack(MAGIC, 1, 8, 3, 4) + b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("pointers", [[0, 0, 0], [0, 7, 16], [0, 3, 8], [2, 8, 18], [0, 16, 6], [0, 6, -2]])
def test_pointers_that_do_not_follow_the_lengths_are_refused(tmp_path: Path, pointers: list[int]) -> None:
    np.arange(10, dtype="<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(indexed([0, 6, 16]))
    assert MegatronDataset(tmp_path / "a").tokens(1).tolist() == [3, 4, 5, 6, 7]
    (tmp_path / "a.idx").write_bytes(indexed(pointers))
    assert refused(lambda: MegatronDataset(tmp_path / "a"))


def test_a_damaged_index_is_refused_or_tells_its_documents(tmp_path: Path) -> None:
    chance = random.Random(3)
    np.arange(10, dtype="<u2").tofile(tmp_path / "a.bin")
    for _ in range(CASES):
        (tmp_path / "a.idx").write_bytes(damage(indexed([0, 6, 16]), chance))

        def read() -> None:
            data = MegatronDataset(tmp_path / "a")
            assert sorted(np.concatenate([data.tokens(n) for n in range(len(data))]).tolist()) == list(range(10))

        refused(read)


def test_a_damaged_header_of_weights_is_refused_or_tells_its_tensors(tmp_path: Path) -> None:
    chance, path = random.Random(4), tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path)
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for _ in range(CASES):
        path.write_bytes(damage(content[: 8 + header], chance) + content[8 + header :])
        if not refused(lambda: WeightsFolder(tmp_path)):
            assert len(WeightsFolder(tmp_path).tensors) == 2


def test_a_damaged_job_is_refused_or_read(tmp_path: Path) -> None:
    chance, path = random.Random(5), tmp_path / "job.yaml"
    content = b"model:\n  hf: /a/b\ndata:\n  text: words.txt\nparallel:\n  tensor: 2\nrun:\n  output: out\n  steps: 3\n"
    for _ in range(CASES):
        at = chance.randrange(len(content))
        middle = chance.choice(
            [b"[" * 2000, b"\0", b"\xff", b"{", b"'", b"- ", b"&a ", b"*a", b"${x}", b"!!int ", b"\t"]
        )
        path.write_bytes(content[:at] + middle + content[at:])
        refused(lambda: load_config(path))


def test_a_path_with_nul_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text('data:\n  text: "a\\0b"\n')
    assert refused(lambda: load_config(path))
