"""The units of a model that are kept: layers, features, heads, experts, channels, by their numbers in the whole model.

All numbers are those of the parent model, counted from 0. Their order is the order in the smaller model: ascending in
a plan, by importance in a model that is only sorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megascore.errors import PlanError
from megascore.weights.huggingface.config import HuggingFaceModelConfig

__all__ = ["LayerUnits", "Units", "all_units", "check_units", "experts_per_token", "heads_in_group"]


@dataclass(frozen=True)
class LayerUnits:
    """What one layer keeps."""

    attention_heads: tuple[int, ...]
    """Query heads; those of one KV head follow one another, in the order of `kv_heads`."""
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    """Channels of the dense MLP; none in a layer with experts."""
    experts: tuple[int, ...] = ()
    """Routed experts; none in a layer without."""
    expert_ffn: tuple[tuple[int, ...], ...] = ()
    """Channels inside of each kept expert, in the order of `experts`."""


@dataclass(frozen=True)
class Units:
    """What a model keeps."""

    hidden_size: tuple[int, ...]
    layers: tuple[int, ...]
    of_layers: Mapping[int, LayerUnits]
    """What each kept layer keeps, by its number in the parent."""

    def kept_layers(self) -> Iterator[tuple[int, LayerUnits]]:
        """Yield each kept layer's number in the parent and its units, in order."""
        for layer in self.layers:
            yield layer, self.of_layers[layer]

    @property
    def is_uniform(self) -> bool:
        """Whether layers that are alike keep equally many of everything, as config.json of one model can say."""
        return all(len(sizes) <= 1 for sizes in self.sizes().values())

    def sizes(self) -> dict[str, set[int]]:
        """Return the numbers that layers keep, by target; layers without such units are left out."""
        layers = [units for _, units in self.kept_layers()]
        return {
            "ffn": {len(units.ffn) for units in layers if units.ffn},
            "attention_heads": {len(units.attention_heads) for units in layers},
            "kv_heads": {len(units.kv_heads) for units in layers},
            "experts": {len(units.experts) for units in layers if units.experts},
            "expert_ffn": {len(channels) for units in layers for channels in units.expert_ffn},
            "hidden_size": {len(self.hidden_size)},
            "layers": {len(self.layers)},
        }

    def with_layer(self, layer: int, **changes: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> Units:
        """Return these units with changes to one layer."""
        changed = replace(self.of_layers[layer], **changes)  # type: ignore[arg-type]  # names and types are the caller's
        return replace(self, of_layers={**self.of_layers, layer: changed})


def all_units(config: HuggingFaceModelConfig) -> Units:
    """Return all units of a model, in order."""
    model = config.architecture
    dense = LayerUnits(_range(model.num_heads), _range(model.num_kv_heads), _range(model.ffn_size))
    of_layers = {}
    for layer in range(model.num_layers):
        of_layers[layer] = dense
        if model.experts is not None and model.experts.layers[layer]:
            channels = (_range(model.experts.ffn_size),) * model.experts.num_experts
            experts = _range(model.experts.num_experts)
            of_layers[layer] = replace(dense, ffn=(), experts=experts, expert_ffn=channels)
    return Units(_range(model.hidden_size), _range(model.num_layers), of_layers)


def heads_in_group(heads: Sequence[int], kv_head: int, config: HuggingFaceModelConfig) -> list[int]:
    """Return those of a layer's query heads that read a KV head, in their order."""
    size = config.architecture.num_heads // config.architecture.num_kv_heads
    return [head for head in heads if head // size == kv_head]


def experts_per_token(config: HuggingFaceModelConfig) -> int:
    """Return how many experts a token goes to; 0 in a dense model."""
    return int(config.architecture.transformer.get("moe_router_topk", 0))


def check_units(units: Units, config: HuggingFaceModelConfig, where: str) -> None:
    """Refuse units that the model does not have, or that leave no working model.

    Args:
        units: What is kept.
        config: The parent.
        where: The plan's name, for errors.

    Raises:
        PlanError: naming the target, the layer, the units and the rule.
    """
    whole = all_units(config)
    _check_numbers(f"{where}: hidden_size", units.hidden_size, len(whole.hidden_size))
    _check_numbers(f"{where}: layers", units.layers, len(whole.layers))
    for layer, kept in units.kept_layers():
        name, parent = f"{where}: layer {layer}", whole.of_layers[layer]
        for target in ("attention_heads", "kv_heads", "ffn", "experts"):
            _check_numbers(f"{name}: {target}", getattr(kept, target), len(getattr(parent, target)))
        _check_groups(name, kept, config)
        top_k = experts_per_token(config)
        if kept.experts and len(kept.experts) < top_k:
            raise PlanError(
                f"{name} keeps {len(kept.experts)} experts, and each token goes to {top_k}: keep at least {top_k}."
            )
        if len(kept.expert_ffn) != len(kept.experts):
            raise PlanError(f"{name} keeps {len(kept.experts)} experts and has channels for {len(kept.expert_ffn)}.")
        for expert, channels in zip(kept.experts, kept.expert_ffn, strict=True):
            total = 0 if config.architecture.experts is None else config.architecture.experts.ffn_size
            _check_numbers(f"{name}: expert_ffn of expert {expert}", channels, total)


def _check_groups(name: str, kept: LayerUnits, config: HuggingFaceModelConfig) -> None:
    groups = {kv_head: heads_in_group(kept.attention_heads, kv_head, config) for kv_head in kept.kv_heads}
    ordered = [head for heads in groups.values() for head in heads]
    alone = sorted(set(kept.attention_heads) - set(ordered))
    if alone:
        raise PlanError(
            f"{name} keeps the attention heads {alone}, whose KV heads it does not keep: keep both or neither."
        )
    if len({len(heads) for heads in groups.values()}) > 1 or not ordered:
        counts = ", ".join(f"KV head {kv_head}: {len(heads)}" for kv_head, heads in groups.items())
        raise PlanError(
            f"{name} keeps other numbers of attention heads for each KV head ({counts}): keep equally many."
        )
    if ordered != list(kept.attention_heads):
        raise PlanError(f"{name}: attention_heads must be in the order of their KV heads, {ordered}.")


def _check_numbers(name: str, kept: Sequence[int], total: int) -> None:
    if total == 0 and not kept:
        return
    if not kept:
        raise PlanError(f"{name} keeps none of {total}: keep one at least.")
    outside = sorted(number for number in kept if not 0 <= number < total)
    if outside:
        has = f"has those from 0 to {total - 1}" if total else "has none here"
        raise PlanError(f"{name} keeps {outside[:5]}, and the model {has}.")
    if len(set(kept)) != len(kept):
        twice = sorted({number for number in kept if kept.count(number) > 1})
        raise PlanError(f"{name} keeps {twice[:5]} twice: name each once.")


def _range(size: int) -> tuple[int, ...]:
    return tuple(range(size))
