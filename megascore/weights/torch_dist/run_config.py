"""The run_config.yaml that Megatron-Bridge keeps beside its checkpoints, in the words of Megatron-LM's command line.

This module alone of its room needs yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megascore.errors import ModelError

__all__ = ["RUN_CONFIG", "args_of_run_config"]

RUN_CONFIG = "run_config.yaml"
PLAIN_PROVIDERS = re.compile(
    r"(GPTModelProvider|GPTProvider\w+|LlamaModelProvider|CodeLlamaModelProvider\w+|Llama2ModelProvider\w*"
    r"|Llama3\d?ModelProvider\w*|MistralModelProvider\w*|MixtralModelProvider\w*|Qwen2ModelProvider\w*"
    r"|Qwen25ModelProvider\w*|Qwen3ModelProvider\w*|Qwen3MoEModelProvider\w*)$"
)
"""Classes of Megatron-Bridge that set fields and build a plain GPTModel; others build with parts of their own."""
PLAIN_SPECS = ("megatron.bridge.models.gpt_provider.", "megatron.core.models.gpt.gpt_layer_specs.")
RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "max_position_embeddings": "seq_length",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "use_rope_scaling": "rope_scaling",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""Argument of Megatron-LM, and the field that holds the same in Megatron-Bridge."""


def args_of_run_config(path: Path) -> Mapping[str, Any]:
    """Return the arguments of Megatron-LM's command line that describe the same model.

    Raises:
        ModelError: unreadable, or a model with parts of its own.
    """
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read as Megatron-Bridge writes it: {error!r}") from error
    if not isinstance(model, dict):
        raise ModelError(f"{path}: model is {type(model).__name__}, expected the fields of a model.")
    provider, spec = _target(model), _target(model.get("transformer_layer_spec"))
    if not PLAIN_PROVIDERS.match(provider.rpartition(".")[2]):
        raise ModelError(_other_ways(f"{path}: a model made by {provider or 'no named class'} is not supported"))
    if spec and not spec.startswith(PLAIN_SPECS):
        raise ModelError(_other_ways(f"{path}: transformer_layer_spec={spec} is not supported"))
    activation, gated = _target(model.get("activation_func")).rpartition(".")[2], bool(model.get("gated_linear_unit"))
    if (activation, gated) not in (("silu", True), ("gelu", False), ("squared_relu", False), ("", False)):
        raise ModelError(
            _other_ways(f"{path}: activation_func={activation} with gated_linear_unit={gated} is not supported")
        )
    args = {name: value for name, value in model.items() if not isinstance(value, dict)}
    args.update({name: args.pop(field) for name, field in RENAMED.items() if field in args})
    return {
        **args,
        "swiglu": gated,
        "squared_relu": activation == "squared_relu",
        "group_query_attention": model.get("num_query_groups") is not None,
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights", True),
    }


def _target(value: Any) -> str:
    """Return the name of a class or function; empty where there is none."""
    return str(value.get("_target_", "")) if isinstance(value, dict) else ""


def _other_ways(what: str) -> str:
    return (
        f"{what}: give a Hugging Face directory of the same model in model.hf, or a function that builds it in "
        "model.provider."
    )
