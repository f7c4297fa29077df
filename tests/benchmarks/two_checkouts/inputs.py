"""Models, texts and configs that both checkouts are given: made once, without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models import SIZES, save_checkpoint, save_tokenizer

__all__ = ["NUM_STEPS", "write_inputs"]

NUM_STEPS, SAMPLES_OF_STEP, LENGTH = 6, 4, 16
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mixtral": {},
    "qwen3_moe": {},
    "unknown": {"num_hidden_layers": 1},
    "overflowing": {"num_hidden_layers": 1},
    "small": {"num_hidden_layers": 1, "vocab_size": 64},
}
FAMILY = {"unknown": "llama", "overflowing": "llama", "small": "llama"}
"""Of models that are not called as their families."""
ALL_DENSE = [
    {"target": "ffn"},
    {"target": "ffn", "method": "independent_contribution"},
    {"target": "ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
    {"target": "attention_heads"},
    {"target": "kv_heads"},
    {"target": "hidden_size"},
    {"target": "hidden_size", "method": "layer_norm_contribution"},
    {"target": "layers"},
]
CALIBRATED = [
    {**entry, "calibration_method": "scale_by_magnitude"} if "iterations" in entry else entry for entry in ALL_DENSE
]
ALL_EXPERTS = [
    {"target": "experts"},
    {"target": "expert_ffn"},
    {"target": "shared_expert_ffn"},
    {"target": "shared_expert_ffn", "method": "independent_contribution"},
    {"target": "shared_expert_ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
    {"target": "layers"},
]
CONFIGS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "minitron": ({"hf": "llama"}, "text", "minitron"),
    "all": ({"hf": "llama"}, "text", ALL_DENSE),
    "qwen3": ({"hf": "qwen3"}, "text", CALIBRATED),
    "documents": ({"hf": "llama"}, "jsonl", ALL_DENSE),
    "mixtral": ({"hf": "mixtral"}, "tokens", "minitron"),
    "qwen3_moe": ({"hf": "qwen3_moe"}, "tokens", "minitron"),
    "loaded": ({"load": "torch_dist"}, "tokens", ALL_DENSE),
    "provided": (
        {"provider": "checkout_models:experts", "fingerprint": "1"},
        "tokens",
        [*ALL_DENSE, *ALL_EXPERTS[:-1]],
    ),
    "few_heads": ({"provider": "checkout_models:dense"}, "tokens", ALL_DENSE),
    "looped": ({"provider": "checkout_models:used_in_a_loop"}, "tokens", "minitron"),
    "saving": ({"provider": "checkout_models:save_checkpoint"}, "tokens", "minitron"),
    "unknown": ({"hf": "unknown"}, "text", "minitron"),
    "overflowing": ({"hf": "overflowing"}, "text", "minitron"),
}
"""Name of a config, with its model, kind of data, and scores."""
DATA = {"text": "words.txt", "jsonl": "documents.jsonl", "tokens": "tokens.npy"}


def write_inputs(folder: Path) -> None:
    """Fill a new folder; jobs run two folders deep beside it, and name these files by relative paths."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    for name, changes in MODELS.items():
        save_checkpoint(folder / name, FAMILY.get(name, name), **changes)
        save_tokenizer(folder / name)
    _save_bert(folder / "bert")
    _spoil(folder)
    num_words = NUM_STEPS * SAMPLES_OF_STEP * LENGTH
    words = [f"w{(7 * i * i + i // 3) % 100}" for i in range(num_words)]
    (folder / DATA["text"]).write_text(" ".join(words))
    lengths = [5 + 7 * i % 19 for i in range(NUM_STEPS * SAMPLES_OF_STEP)]
    documents = [json.dumps({"text": " ".join(words[3 * i : 3 * i + length])}) for i, length in enumerate(lengths)]
    (folder / DATA["jsonl"]).write_text("\n".join(documents))
    shape = (NUM_STEPS * SAMPLES_OF_STEP, LENGTH)
    np.save(folder / DATA["tokens"], np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape))
    for name, (model, data, scores) in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(json.dumps(_sections(model, data, scores)))
    (folder / "no.yaml").write_text("model: [")


def _sections(model: dict[str, str], data: str, scores: Any) -> dict[str, Any]:
    paths = {key: f"../../inputs/{value}" if key in ("hf", "load") else value for key, value in model.items()}
    return {
        "model": {**paths, "dtype": "float32"},
        "data": {data: f"../../inputs/{DATA[data]}", "sequence_length": LENGTH, "packing": data != "jsonl"},
        "scores": scores,
        "run": {
            "output": "scores.safetensors",
            "device": "cpu",
            "global_batch_size": SAMPLES_OF_STEP,
            "timeout_minutes": 1,
        },
    }


def _save_bert(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    # BERT has a KV head for each query head, whatever a config says that is not its own.
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    model = AutoModel.from_config(AutoConfig.for_model("bert", **sizes, hidden_act="gelu"))
    model.save_pretrained(folder)


def _spoil(folder: Path) -> None:
    """Make a model of no known family, and one whose activations are not finite."""
    from safetensors.torch import load_file, save_file

    config = folder / "unknown" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "model_type": "unheard_of", "architectures": ["UnheardOf"]}))
    weights = folder / "overflowing" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, weights, {"format": "pt"})
