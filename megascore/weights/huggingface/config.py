"""The config.json of a Hugging Face checkpoint, in the terms that a Megatron model is built from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megascore.errors import ModelError
from megascore.weights.huggingface.config_values import ConfigValues, UnsupportedModelError
from megascore.weights.huggingface.expert_config import (
    HuggingFaceExperts,
    read_mixtral_experts,
    read_qwen3_experts,
)

__all__ = ["FAMILIES", "HuggingFaceModelConfig", "read_config"]

MEGATRON_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's ``rope_scaling`` has built in; only the factor can be chosen."""


@dataclass(frozen=True)
class HuggingFaceModelConfig:
    """Shape and variant of a decoder of the Llama family, dense or with routed experts in some layers."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_llama3_factor: float | None
    """Factor of Llama 3's rotary scaling; None without."""
    rope_linear_factor: float | None
    """Factor of linear position interpolation; None without."""
    tied_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    """Keys that a query sees, itself included, in the layers of `sliding_layers`; None where all see everything."""
    sliding_layers: tuple[bool, ...]
    experts: HuggingFaceExperts | None = None
    """Routed experts; None in a dense model."""


@dataclass(frozen=True)
class _Family:
    """What transformers takes for granted in one model type, beyond what config.json says."""

    qkv_bias: bool = False
    """Whether q, k and v have biases whatever ``attention_bias`` says."""
    qk_norm: bool = False
    can_slide: bool = False
    slides_everywhere: bool = False
    """Whether a window holds in all layers, whatever ``max_window_layers`` says."""
    read_experts: Callable[[ConfigValues, int], HuggingFaceExperts] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(
        can_slide=True, slides_everywhere=True, defaults={"sliding_window": 4096, "use_sliding_window": True}
    ),
    "mixtral": _Family(
        can_slide=True,
        slides_everywhere=True,
        read_experts=read_mixtral_experts,
        defaults={"use_sliding_window": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    ),
    "qwen2": _Family(qkv_bias=True, can_slide=True),
    "qwen3": _Family(qk_norm=True, can_slide=True, defaults={"head_dim": 128}),
    "qwen3_moe": _Family(qk_norm=True, can_slide=True, slides_everywhere=True, read_experts=read_qwen3_experts),
}


def read_config(directory: str | Path) -> HuggingFaceModelConfig:
    """Read and check ``config.json`` of a checkpoint directory.

    Args:
        directory: Hugging Face checkpoint directory.

    Raises:
        ModelError: no directory, no readable config.json, a key missing, an architecture or a variant that is not
            supported.
    """
    path, raw = _read_json(directory)
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{path}: model_type '{model_type}' is not supported; supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    values = ConfigValues(path, {**family.defaults, **raw})
    values.refuse_unless("hidden_act", "silu", default="silu")
    if values.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{path}: quantized checkpoints are not supported: give the model in float32, float16 or bfloat16."
        )
    num_layers = values.positive("num_hidden_layers")
    num_heads = values.positive("num_attention_heads")
    hidden_size = values.positive("hidden_size")
    window, sliding_layers = _sliding(values, family, num_layers)
    rope = _rope(values)
    return HuggingFaceModelConfig(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=values.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=values.positive("num_key_value_heads", default=num_heads),
        head_dim=values.positive("head_dim", default=hidden_size // num_heads),
        vocab_size=values.positive("vocab_size"),
        max_positions=values.positive("max_position_embeddings"),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.theta,
        rope_llama3_factor=rope.llama3_factor,
        rope_linear_factor=rope.linear_factor,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or bool(values.get("attention_bias", False)),
        attention_output_bias=not family.qkv_bias and bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=sliding_layers,
        experts=None if family.read_experts is None else family.read_experts(values, num_layers),
    )


def _read_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    path = _config_file(directory)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__}, expected an object with a model_type.")
    return path, raw


def _config_file(directory: str | Path) -> Path:
    root = Path(directory)
    if not root.is_dir():
        raise ModelError(f"model directory {root} not found: model.hf expects a Hugging Face checkpoint directory.")
    path = root / "config.json"
    if not path.is_file():
        raise ModelError(f"{root} has no config.json: model.hf expects a Hugging Face checkpoint directory.")
    return path


@dataclass(frozen=True)
class _Rope:
    theta: float
    llama3_factor: float | None = None
    linear_factor: float | None = None


def _rope(values: ConfigValues) -> _Rope:
    """Rotary settings: transformers 5 has them under rope_parameters, older ones under rope_theta and rope_scaling."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    settings = ConfigValues(values.path, given)
    theta = float(settings.get("rope_theta", values.get("rope_theta", 10000.0)))
    ConfigValues(values.path, {**values.raw, **given}).refuse_unless("partial_rotary_factor", 1.0, default=1.0)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return _Rope(theta)
    if kind == "linear":
        return _Rope(theta, linear_factor=float(settings.get("factor", 1.0)))
    if kind != "llama3":
        raise UnsupportedModelError(
            f"{values.path}: rotary scaling '{kind}' is not supported; supported: default, linear, llama3."
        )
    for key, built_in in MEGATRON_LLAMA3_ROPE.items():
        found = settings.get(key)
        if found != built_in:
            raise UnsupportedModelError(
                f"{values.path}: rotary scaling 'llama3' with {key}={found} is not supported: "
                f"Megatron-Core has {built_in} built in."
            )
    return _Rope(theta, llama3_factor=float(settings.get("factor", 8.0)))


def _sliding(values: ConfigValues, family: _Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it: said by layer_types, or from max_window_layers on."""
    window = values.raw.get("sliding_window")
    nowhere = (False,) * num_layers
    if not family.can_slide or window is None or not values.get("use_sliding_window", False):
        return None, nowhere
    kinds = None if family.slides_everywhere else values.get("layer_types")
    first = 0 if family.slides_everywhere else values.get("max_window_layers", 28)
    if kinds is None:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelError(
            f"{values.path}: layer_types is {kinds}: expected {num_layers} of 'full_attention' or 'sliding_attention'."
        )
    layers = tuple(kind == "sliding_attention" for kind in kinds)
    return (int(window), layers) if any(layers) else (None, nowhere)
