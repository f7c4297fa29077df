"""config.json of a smaller model: every field that depends on what went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megascore.errors import PlanError
from megascore.plans.units import Units
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.families import FAMILIES

__all__ = ["smaller_config", "smaller_config_json"]

NOT_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mlp_only_layers")
"""Lists whose length has nothing to do with the number of layers."""
NUM_EXPERTS = ("num_local_experts", "num_experts")
"""Names of one field: transformers 5 writes the first for every family, older ones wrote the second for some."""


def smaller_config_json(raw: Mapping[str, Any], config: HuggingFaceModelConfig, units: Units) -> dict[str, Any]:
    """Return config.json of the model that has these units alone.

    Args:
        raw: That of the parent.
        config: The same, read.
        units: What is kept; equally many in all layers that are alike.

    Raises:
        PlanError: config.json has a list for layers that is not known here, so what it would be can't be told.
    """
    family = FAMILIES[config.architecture.model_type]
    sizes = {target: next(iter(found)) for target, found in units.sizes().items() if found}
    changed = dict(raw)
    changed |= {
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["attention_heads"],
        "num_key_value_heads": sizes["kv_heads"],
        # Else it would be taken for hidden_size / num_attention_heads.
        "head_dim": config.head_dim,
    }
    if "ffn" in sizes:
        changed["intermediate_size"] = sizes["ffn"]
    if "experts" in sizes:
        assert family.expert_sizes is not None, "a family with experts says where their sizes stand"
        names = [name for name in NUM_EXPERTS if raw.get(name) is not None] or [family.expert_sizes.num_experts]
        changed |= dict.fromkeys(names, sizes["experts"])
        changed[family.expert_sizes.ffn_size] = sizes["expert_ffn"]
    if len(units.layers) < config.architecture.num_layers:
        changed |= _fields_of_layers(raw, config, units)
    return changed


def smaller_config(config: HuggingFaceModelConfig, units: Units) -> HuggingFaceModelConfig:
    """Return what config.json of the smaller model must be read as: the parent with other sizes, its layers alike.

    Raises:
        PlanError: no layer with experts is left, which no config of the family can say.
    """
    model = config.architecture
    sizes = {target: next(iter(found)) for target, found in units.sizes().items() if found}
    experts = model.experts
    if experts is not None:
        kinds = tuple(experts.layers[layer] for layer in units.layers)
        if not any(kinds):
            raise PlanError(
                f"the plan keeps no layer with experts, and a {model.model_type} without any can't be told in its "
                "config.json: keep one of the layers "
                f"{', '.join(str(layer) for layer, has in enumerate(experts.layers) if has)}."
            )
        experts = replace(experts, num_experts=sizes["experts"], ffn_size=sizes["expert_ffn"], layers=kinds)
    slides = tuple(model.sliding_layers[layer] for layer in units.layers) if model.sliding_layers else ()
    smaller = replace(
        model,
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["attention_heads"],
        num_kv_heads=sizes["kv_heads"],
        ffn_size=sizes.get("ffn", model.ffn_size),
        sliding_window=model.sliding_window if any(slides) else None,
        sliding_layers=slides,
        experts=experts,
    )
    return replace(config, architecture=smaller, stored_names={})


def _fields_of_layers(raw: Mapping[str, Any], config: HuggingFaceModelConfig, units: Units) -> dict[str, Any]:
    """Return the fields that name layers, so that each layer that stays is what it was."""
    num_layers, experts = config.architecture.num_layers, config.architecture.experts
    fields: dict[str, Any] = {}
    if isinstance(raw.get("layer_types"), list):
        fields["layer_types"] = [raw["layer_types"][layer] for layer in units.layers]
    if raw.get("max_window_layers") is not None or config.architecture.sliding_window is not None:
        first = raw.get("max_window_layers")
        first = 28 if first is None else first
        fields["max_window_layers"] = sum(layer < first for layer in units.layers)
    if experts is not None and FAMILIES[config.architecture.model_type].can_have_dense_layers:
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [
            position for position, layer in enumerate(units.layers) if not experts.layers[layer]
        ]
    for name, value in raw.items():
        is_of_layers = isinstance(value, list) and len(value) == num_layers > 1 and name not in NOT_OF_LAYERS
        if is_of_layers and name not in fields:
            raise PlanError(
                f"config.json has {name}, a list with an entry for each of the {num_layers} layers, and what it says "
                "is not known: layers of this model can't be dropped. Plan other sizes, or take the field out."
            )
    return fields
