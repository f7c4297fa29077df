"""Sources of a Megatron parameter, and the tensors that a checkpoint has, by the table of tensors."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import NamedTuple

from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.names import BASE_MODEL, stored_name
from megascore.weights.huggingface.tensors import EMBEDDING, FUSED_DOWN, HEAD, LAYER, RULES, Rule, Source

__all__ = [
    "Found",
    "all_tensors",
    "as_stored",
    "find_rule",
    "is_known_extra",
    "names_of",
    "places_of",
    "sources_of",
]

LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.")
# Megatron's two ways to have experts: a list of MLPs, and Transformer Engine's grouped layers.
EXPERT_PARAMETER = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<number>\d+)\.(?P<linear>linear_fc[12])\.weight"
    r"|(?P<grouped_linear>linear_fc[12])\.weight(?P<grouped_number>\d+))$"
)
_RULE_OF = {name: rule for rule in RULES for name in rule.parameters}


class Found(NamedTuple):
    """The rule for a parameter, and the numbers in its name."""

    rule: Rule
    layer: int | None
    """Number of its layer on this rank; None outside of layers."""
    expert: int | None = None
    """Number of its expert on this rank; None outside of experts."""


def find_rule(parameter: str) -> Found | None:
    """Return the rule for a Megatron parameter, with the numbers in its name; None where there is no rule."""
    match = LAYER_PARAMETER.match(parameter)
    if match is None:
        rule = _RULE_OF.get(parameter)
        return None if rule is None else Found(rule, None)
    name, expert = parameter[match.end() :], None
    if (of_expert := EXPERT_PARAMETER.match(name)) is not None:
        name = f"mlp.experts.{of_expert['linear'] or of_expert['grouped_linear']}"
        expert = int(of_expert["number"] or of_expert["grouped_number"])
    rule = _RULE_OF.get(LAYER + name)
    return None if rule is None else Found(rule, int(match.group(1)), expert)


def sources_of(
    rule: Rule, config: HuggingFaceModelConfig, layer: int | None, expert: int | None = None
) -> tuple[Source, ...]:
    """Return the tensors of the checkpoint that make up a parameter.

    Args:
        rule: Rule of the parameter.
        config: The model, as `as_stored` returns it.
        layer: Global layer number, counted from 0; None outside of layers.
        expert: Global number of the expert; None outside of experts.

    Returns:
        Sources with their full names; none where the parameter is zero.
    """
    if rule.only_if is not None and not getattr(config, rule.only_if):
        return ()
    sources = (EMBEDDING,) if rule.sources == (HEAD,) and config.tied_embeddings else rule.sources
    if rule.per_expert and config.fused_experts:
        assert expert is not None
        assert config.architecture.experts is not None
        which = (expert, config.architecture.experts.num_experts)
        sources = tuple(replace(source, parts=(which, *source.parts)) for source in rule.fused_sources)
    names = {} if config.expert_names is None else config.expert_names._asdict()
    # A name of `ExpertNames` may hold the number of the expert.
    full_names = [source.name.format(layer=layer, **names).format(expert=expert) for source in sources]
    return tuple(
        replace(source, name=config.stored_names.get(name, name), layer=layer, expert=expert)
        for source, name in zip(sources, full_names, strict=True)
    )


def as_stored(config: HuggingFaceModelConfig, names: Container[str]) -> HuggingFaceModelConfig:
    """Return the config of a model as a checkpoint with tensors of these names stores it.

    Checkpoints of transformers 5 may have all experts of a layer in one tensor; those of a base model may have names
    without its prefix; and tied embeddings may be there as the output layer alone.
    """
    config = _with_experts_as_stored(replace(config, stored_names={}), names)
    stored = {name: _stored_name(name, config, names) for name in all_tensors(config)}
    return replace(config, stored_names={name: own for name, own in stored.items() if own not in (None, name)})


def names_of(name: str, config: HuggingFaceModelConfig) -> tuple[str, ...]:
    """Return the names in the whole model of a tensor of the table: several, if it is tied."""
    is_tied = config.tied_embeddings and name in (EMBEDDING.name, HEAD.name)
    return (EMBEDDING.name, HEAD.name) if is_tied else (name,)


def _stored_name(name: str, config: HuggingFaceModelConfig, names: Container[str]) -> str | None:
    return stored_name(names_of(name, config), BASE_MODEL, names)


def _with_experts_as_stored(config: HuggingFaceModelConfig, names: Container[str]) -> HuggingFaceModelConfig:
    if config.expert_names is None or config.architecture.experts is None:
        return config
    fused_down = FUSED_DOWN.name.format(layer=config.architecture.experts.layers.index(True))
    if _stored_name(fused_down, config, names) is None:
        return config
    # transformers 5 calls the router so wherever it has the experts in one tensor.
    return replace(config, fused_experts=True, expert_names=config.expert_names._replace(router="mlp.gate.weight"))


def all_tensors(config: HuggingFaceModelConfig) -> dict[str, Source]:
    """Return every tensor that a checkpoint of this model must have, by its name, each as a whole.

    Args:
        config: The model, as `as_stored` returns it.
    """
    return {
        source.name: replace(source, parts=(), expert=None) if source.parts else source
        for rule in RULES
        for layer, expert in places_of(rule, config)
        for source in sources_of(rule, config, layer, expert)
    }


def places_of(rule: Rule, config: HuggingFaceModelConfig) -> Iterator[tuple[int | None, int | None]]:
    """Yield layer and expert, where they apply, of each parameter that a rule is for."""
    if not rule.parameters[0].startswith(LAYER):
        yield None, None
        return
    experts = config.architecture.experts
    for layer in range(config.architecture.num_layers):
        has_experts = experts is not None and experts.layers[layer]
        if rule.of_experts in (None, has_experts):
            for expert in range(experts.num_experts) if rule.per_expert and experts is not None else (None,):
                yield layer, expert


def is_known_extra(name: str, config: HuggingFaceModelConfig) -> bool:
    """Whether a tensor that no rule uses is one that checkpoints have for no effect."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD.name and config.tied_embeddings)
