"""Tiny random Hugging Face checkpoints, and what transformers says of them."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DENSE_FAMILIES",
    "FAMILIES",
    "SIZES",
    "cache_keyword",
    "load_with_transformers",
    "reference_logits",
    "reference_loss",
    "rename_tensors",
    "save_checkpoint",
    "save_tokenizer",
    "tensors_of",
]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "mistral": {"head_dim": 24, "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}
"""One variant of each family: biases, tied embeddings, head sizes and rotary base differ between them."""
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def cache_keyword(model: torch.nn.Module) -> str:
    """Return what a model or a block of the installed transformers calls the cache that it takes."""
    [keyword] = {"cache", "past_key_values", "past_key_value"} & set(inspect.signature(model.forward).parameters)
    return keyword


def save_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    fused_experts: bool = False,
    **changes: Any,
) -> Path:
    """Make a random model of a family and save it.

    Args:
        directory: Where to; made if needed.
        family: Key of `FAMILIES`.
        seed: Of the weights.
        max_shard_size: Of the safetensors files.
        fused_experts: Save the experts of a layer in one tensor, as transformers has them in memory.
        changes: Config values other than those of `SIZES` and `FAMILIES`.

    Returns:
        The directory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero, where a mistake in loading them would not show.
            spread = 0.1 if "proj" in name or "embed" in name or "lm_head" in name else 0.3
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    form = {"save_original_format": False} if fused_experts else {}
    model.save_pretrained(directory, max_shard_size=max_shard_size, **form)
    return directory


def rename_tensors(source: Path, target: Path, new_name: Callable[[str], str | None]) -> Path:
    """Copy a checkpoint of one file under other names of its tensors; those without a new one are left out."""
    from safetensors.torch import save_file

    target.mkdir()
    named = {new_name(name): value for name, value in tensors_of(source / "model.safetensors").items()}
    kept = {name: value for name, value in named.items() if name is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", target)
    return target


def load_with_transformers(directory: Path | str, dtype: torch.dtype, **options: Any) -> Any:
    """Return transformers' causal model of a directory in a dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def save_tokenizer(folder: Path) -> Path:
    """Put a tokenizer beside a model: one token for each word, w0 to w99. Returns the folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(100)} | {"?": 100}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Return copies of a safetensors file's tensors, so that the file may be written again: safetensors maps it."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@torch.no_grad()
def reference_logits(directory: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of transformers, [B, S, V], for tokens [B, S]."""
    model = load_with_transformers(directory, dtype, attn_implementation="eager")
    logits: torch.Tensor = model.eval()(tokens).logits
    return logits


def reference_loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean next-token loss in nats, computed in float64."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten()))
