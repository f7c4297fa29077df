"""The architecture of a model from its checkpoint: from Megatron-LM's command line, or Megatron-Bridge's config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig

from megascore.errors import ModelError
from megascore.weights.architecture import Architecture, Experts
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint
from megascore.weights.torch_dist.inert import InertRecord
from megascore.weights.torch_dist.run_config import RUN_CONFIG, args_of_run_config

__all__ = ["architecture_from_args"]

PASSED_ON = (
    "normalization",
    "qk_layernorm",
    "add_bias_linear",
    "add_qkv_bias",
    "kv_channels",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
    "fp32_residual_connection",
    "rotary_interleaved",
    "softmax_scale",
    "no_rope_freq",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_dtype",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_apply_probs_on_input",
)
"""Arguments that are fields of Megatron's ``TransformerConfig``, by the same name, and change what a model computes."""
NOT_SUPPORTED = (
    "multi_latent_attention",
    "is_hybrid_model",
    "hybrid_override_pattern",
    "hybrid_layer_pattern",
    "heterogeneous_layers_config_path",
    "experimental_attention_variant",
    "linear_attention_freq",
    "attention_output_gate",
    "apply_layernorm_1p",
    "qk_l2_norm",
    "quick_geglu",
    "use_legacy_models",
    "use_mup",
    "enable_mhc_connections",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
)
"""Arguments whose models are built of other parts, or compute otherwise; they may be there, but not switched on."""
ONLY = {
    "softmax_type": ("vanilla",),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}
"""Arguments that change what a model of the same weights computes, and the values with which they don't."""
POSITIONS = ("rope", "learned_absolute", "none")


def architecture_from_args(checkpoint: MegatronCheckpoint) -> Architecture:
    """Return the architecture of the model in a checkpoint.

    Raises:
        ModelError: the checkpoint keeps neither, they lack something, or they ask for what is not supported.
    """
    args = _find_args(checkpoint)
    for name in NOT_SUPPORTED:
        if args.get(name):
            raise ModelError(
                f"{args.where}: {name}={args.get(name)} is not supported: give a function that builds the model in "
                "model.provider."
            )
    _check_values(args)
    num_layers, num_heads = args.number("num_layers"), args.number("num_attention_heads")
    hidden_size = args.number("hidden_size")
    grouped = args.get("group_query_attention", False)
    window, sliding_layers = _sliding(args, num_layers)
    return Architecture(
        model_type="Megatron",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=args.number("num_query_groups") if grouped else num_heads,
        ffn_size=args.number("ffn_hidden_size", default=4 * hidden_size),
        vocab_size=_vocab_size(args, checkpoint),
        max_positions=args.number("max_position_embeddings"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        experts=_experts(args, num_layers) if args.get("num_experts") else None,
        transformer={**_passed_on(args), **_activation(args), "layernorm_epsilon": args.get("norm_epsilon", 1e-5)},
        gpt=_gpt_values(args),
    )


@dataclass(frozen=True)
class _Args:
    values: Mapping[str, Any]
    where: str

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        if isinstance(value, InertRecord) or (isinstance(value, type) and issubclass(value, InertRecord)):
            raise ModelError(
                f"{self.where}: {name} is a {value.pickled_name}, which is not read: expected a plain value. Give a "
                "Hugging Face directory of the same model in model.hf, or model.provider."
            )
        return default if value is None else value

    def number(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.where}: {name} is {value}: expected a whole number of at least 1.")
        return value


def _find_args(checkpoint: MegatronCheckpoint) -> _Args:
    common, run_config = checkpoint.common, checkpoint.folder / RUN_CONFIG
    given = common.values.get("args")
    if isinstance(given, argparse.Namespace):
        return _Args(vars(given), f"args in {common.where}")
    if run_config.is_file():
        return _Args(args_of_run_config(run_config), str(run_config))
    raise ModelError(
        f"{checkpoint.folder} has no {RUN_CONFIG}, and {common.where} no 'args', so it does not say what model it is "
        "of: give a Hugging Face directory of the same model in model.hf (its config.json and tokenizer are read, not "
        "its weights), or a function that builds the model in model.provider."
    )


def _check_values(args: _Args) -> None:
    for name, allowed in ONLY.items():
        given = args.get(name, allowed[0])
        others = [value for value in (given if isinstance(given, list) else [given]) if value not in allowed]
        if others:
            raise ModelError(
                f"{args.where}: {name}={others[0]} is not supported; supported: {', '.join(allowed)}. Give a function "
                "that builds the model in model.provider."
            )


def _vocab_size(args: _Args, checkpoint: MegatronCheckpoint) -> int:
    """Return how many rows of the embedding are tokens: all, as in Megatron's own loss, where nothing says."""
    # A null tokenizer, for made-up data, may have a token more than it was told.
    if args.get("vocab_size") is None or str(args.get("tokenizer_type", "")).startswith("Null"):
        return checkpoint.vocab_size
    vocab_size = args.number("vocab_size")
    checkpoint.check_vocabulary(vocab_size, args.where)
    return vocab_size


def _passed_on(args: _Args) -> dict[str, Any]:
    known = {field.name for field in fields(TransformerConfig)}
    values = {name: args.get(name) for name in PASSED_ON if args.get(name) is not None}
    for name, value in values.items():
        if name not in known and value:
            raise ModelError(f"{args.where}: {name}={value} is not known to the megatron-core installed here.")
    return {name: value for name, value in values.items() if name in known}


def _activation(args: _Args) -> dict[str, Any]:
    function: Callable[..., Any] = torch.nn.functional.gelu
    if args.get("swiglu"):
        function = torch.nn.functional.silu
    elif args.get("squared_relu"):
        function = squared_relu
    return {"gated_linear_unit": bool(args.get("swiglu", False)), "activation_func": function}


def _gpt_values(args: _Args) -> dict[str, Any]:
    positions = args.get("position_embedding_type", "learned_absolute")
    if positions not in POSITIONS:
        raise ModelError(
            f"{args.where}: position_embedding_type={positions} is not supported; supported: {', '.join(POSITIONS)}."
        )
    return {
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights", False),
        "position_embedding_type": positions,
        "rotary_base": args.get("rotary_base", 10000),
        "rotary_percent": args.get("rotary_percent", 1.0),
        "rope_scaling": args.get("use_rope_scaling", False),
        "rope_scaling_factor": args.get("rope_scaling_factor", 8.0),
        "seq_len_interpolation_factor": args.get("rotary_seq_len_interpolation_factor"),
    }


def _sliding(args: _Args, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window, skipped = args.get("window_size"), args.get("window_attn_skip_freq")
    if window is None:
        return None, (False,) * num_layers
    if window[1] != 0:
        raise ModelError(f"{args.where}: window_size={window} is not supported: expected (keys before the query, 0).")
    if isinstance(skipped, list):
        return int(window[0]) + 1, tuple(map(bool, skipped))
    # Megatron counts layers from 1.
    return int(window[0]) + 1, tuple(skipped is None or layer % skipped != 0 for layer in range(1, num_layers + 1))


def _experts(args: _Args, num_layers: int) -> Experts:
    frequency = args.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [layer % frequency == 0 for layer in range(num_layers)]
    if len(frequency) != num_layers:
        raise ModelError(
            f"{args.where}: moe_layer_freq={frequency}: expected one entry for each of {num_layers} layers."
        )
    return Experts(
        num_experts=args.number("num_experts"),
        ffn_size=args.number("moe_ffn_hidden_size", default=args.get("ffn_hidden_size")),
        layers=tuple(map(bool, frequency)),
    )
