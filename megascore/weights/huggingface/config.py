"""The config.json of a Hugging Face checkpoint: what Megatron builds the model from, and which tensors it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megascore.errors import ModelError
from megascore.files.json_text import parse_json
from megascore.weights.architecture import Architecture
from megascore.weights.huggingface.config_values import ConfigValues, UnsupportedModelError
from megascore.weights.huggingface.families import FAMILIES, ExpertNames, Family

__all__ = ["HuggingFaceModelConfig", "read_config"]

MEGATRON_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's ``rope_scaling`` has built in; only the factor can be chosen."""


MOST_LAYERS = 10_000
"""Decoders have a few hundred. Beyond this it is a slip, and lists of every layer's tensors would take minutes before
the first one is found missing."""


@dataclass(frozen=True)
class HuggingFaceModelConfig:
    """A decoder of the Llama family, dense or with routed experts in some layers."""

    architecture: Architecture
    """The model in Megatron's terms."""
    head_dim: int
    """Channels of each attention head."""
    tied_embeddings: bool
    """Whether the output layer has the embedding's weights."""
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether each head's queries and keys go through a norm."""
    expert_names: ExpertNames | None = None
    """Names of the tensors of routed experts; None in a dense model."""
    fused_experts: bool = False
    """Whether the experts of a layer are in one tensor. Only the tensors tell, not config.json: see `as_stored`."""
    stored_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names of tensors in the checkpoint by those in the table, where these are others: see `as_stored`."""


def read_config(directory: str | Path) -> HuggingFaceModelConfig:
    """Read and check ``config.json`` of a checkpoint directory.

    Args:
        directory: Hugging Face checkpoint directory.

    Raises:
        ModelError: no directory, no readable config.json, a key missing, an architecture or a variant that is not
            supported.
    """
    values, family = _read_values(directory)
    num_layers = values.positive("num_hidden_layers", most=MOST_LAYERS)
    num_heads = values.positive("num_attention_heads")
    hidden_size = values.positive("hidden_size")
    window, sliding_layers = _sliding(values, family, num_layers)
    experts, router = family.read_experts(values, num_layers) if family.read_experts else (None, {})
    attention_bias = values.flag("attention_bias", default=False)
    config = HuggingFaceModelConfig(
        architecture=Architecture(
            model_type=values.text("model_type"),
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=values.positive("num_key_value_heads", default=num_heads),
            ffn_size=values.positive("intermediate_size"),
            vocab_size=values.positive("vocab_size"),
            max_positions=values.positive("max_position_embeddings"),
            sliding_window=window,
            sliding_layers=sliding_layers,
            experts=experts,
        ),
        head_dim=values.positive("head_dim", default=hidden_size // num_heads),
        tied_embeddings=values.flag("tie_word_embeddings", default=False),
        qkv_bias=family.qkv_bias or attention_bias,
        attention_output_bias=attention_bias and not family.qkv_bias,
        mlp_bias=values.flag("mlp_bias", default=False),
        qk_norm=family.qk_norm,
        expert_names=family.expert_names,
    )
    transformer, gpt = {**_transformer_arguments(values, config), **router}, _gpt_arguments(values, config)
    return replace(config, architecture=replace(config.architecture, transformer=transformer, gpt=gpt))


def _transformer_arguments(values: ConfigValues, config: HuggingFaceModelConfig) -> dict[str, Any]:
    return {
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": values.number("rms_norm_eps", 1e-6),
        "qk_layernorm": config.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        # Megatron has one switch for the biases of the attention output and both MLP layers; those that the checkpoint
        # does not have are zero.
        "add_bias_linear": config.attention_output_bias or config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "attention_softmax_in_fp32": True,
    }


def _gpt_arguments(values: ConfigValues, config: HuggingFaceModelConfig) -> dict[str, Any]:
    return {
        "share_embeddings_and_output_weights": config.tied_embeddings,
        "position_embedding_type": "rope",
        **_rotary_arguments(values),
    }


def _read_values(directory: str | Path) -> tuple[ConfigValues, Family]:
    """Read a config.json, and check what no family may have."""
    path, raw = _read_json(directory)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigValues(path, raw).wrong("model_type", model_type, f"one of {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{path}: model_type '{model_type}' is not supported; supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    values = ConfigValues(path, {**family.defaults, **raw})
    values.refuse_unless("hidden_act", "silu", default="silu")
    values.refuse_unless("is_causal", True, default=True)
    if values.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{path}: quantized checkpoints are not supported: give the model in float32, float16 or bfloat16."
        )
    return values, family


def _read_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    path = _config_file(directory)
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
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


def _rotary_arguments(values: ConfigValues) -> dict[str, Any]:
    # transformers 5 has the settings under rope_parameters, older versions under rope_theta and rope_scaling.
    newer, older = values.mapping("rope_parameters"), values.mapping("rope_scaling")
    if newer.raw and older.raw and newer.raw != older.raw:
        raise ModelError(
            f"{values.path}: rope_parameters is {newer.raw} and rope_scaling {older.raw}, and versions of transformers "
            "take one or the other: keep the one that the model was trained with."
        )
    settings = newer if newer.raw else older
    ConfigValues(values.path, {**values.raw, **settings.raw}).refuse_unless("partial_rotary_factor", 1.0, default=1.0)
    kind = settings.text("rope_type", settings.text("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(
            f"{values.path}: rotary scaling '{kind}' is not supported; supported: default, linear, llama3."
        )
    for key, built_in in MEGATRON_LLAMA3_ROPE.items() if kind == "llama3" else ():
        found = settings.get(key)
        if found != built_in:
            raise UnsupportedModelError(
                f"{values.path}: rotary scaling 'llama3' with {key}={found} is not supported: "
                f"Megatron-Core has {built_in} built in."
            )
    return {
        "rotary_base": settings.number("rope_theta", values.number("rope_theta", 10000.0)),
        "rope_scaling": kind == "llama3",
        "rope_scaling_factor": settings.number("factor", 8.0) if kind == "llama3" else 1.0,
        "seq_len_interpolation_factor": settings.number("factor", 1.0) if kind == "linear" else None,
    }


def _sliding(values: ConfigValues, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window, and which layers have it: those that layer_types names, or all from max_window_layers on."""
    window = values.raw.get("sliding_window")
    nowhere = (False,) * num_layers
    if family.ignores_kinds and window is not None and not values.flag("use_sliding_window", default=True):
        raise ModelError(
            f"{values.path}: use_sliding_window is false and sliding_window {window}, and {values.text('model_type')} "
            "slides all the same in transformers: set sliding_window to null, or take the key out."
        )
    if not family.can_slide or window is None or not values.flag("use_sliding_window", default=False):
        return None, nowhere
    if family.ignores_kinds:
        _refuse_ignored_kinds(values)
    kinds = None if family.slides_everywhere else values.texts("layer_types")
    first = 0 if family.slides_everywhere else _first_sliding(values)
    if kinds is None:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelError(
            f"{values.path}: layer_types is {kinds}: expected {num_layers} of 'full_attention' or 'sliding_attention'."
        )
    layers = tuple(kind == "sliding_attention" for kind in kinds)
    return (values.positive("sliding_window"), layers) if any(layers) else (None, nowhere)


def _refuse_ignored_kinds(values: ConfigValues) -> None:
    kinds = values.texts("layer_types")
    if kinds is not None and set(kinds) != {"sliding_attention"}:
        raise ModelError(
            f"{values.path}: layer_types is {kinds}, and {values.text('model_type')} has the window in all layers in "
            "transformers, whatever they say: give the model_type whose layers differ (ministral), or take the key out."
        )


def _first_sliding(values: ConfigValues) -> int:
    first = values.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise values.wrong("max_window_layers", first, "a whole number of at least 0")
    return first
