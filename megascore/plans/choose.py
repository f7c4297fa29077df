"""From sizes and orders to the units that are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megascore.plans.orders import Orders
from megascore.plans.units import LayerUnits, Units, all_units, heads_in_group
from megascore.weights.huggingface.config import HuggingFaceModelConfig

__all__ = ["Sizes", "choose_layers", "choose_units", "sorted_units", "spread_over_layers"]

Sizes = Mapping[str, int]
"""How many units are kept, by target; targets that are left out stay whole."""


def choose_units(config: HuggingFaceModelConfig, sizes: Sizes, orders: Orders) -> Units:
    """Return the most important units of each kind, in the order of the parent.

    Args:
        config: The parent.
        sizes: How many are kept in each layer or in the model; fit for the model, see `megascore.plans.sizes`.
        orders: What says which units matter. It is asked only for targets of which some go.

    Raises:
        PlanError: the orders know nothing of a target.
    """
    whole = all_units(config)
    layers = choose_layers(config, sizes.get("layers", len(whole.layers)), orders)
    return Units(
        _kept(orders, "hidden_size", None, None, whole.hidden_size, sizes),
        layers,
        {layer: _layer_units(config, layer, whole.of_layers[layer], sizes, orders) for layer in layers},
    )


def choose_layers(config: HuggingFaceModelConfig, number: int, orders: Orders) -> tuple[int, ...]:
    """Return the most important layers, in the order of the parent; ``orders`` is asked only if some go.

    Raises:
        PlanError: the orders know nothing of layers.
    """
    return _kept(orders, "layers", None, None, tuple(range(config.architecture.num_layers)), {"layers": number})


def sorted_units(config: HuggingFaceModelConfig, orders: Orders, targets: set[str]) -> Units:
    """Return all units, those of the targets with the most important one first; layers keep their order.

    Query heads are sorted inside of their KV group, and groups by their KV head. The model computes the same.

    Raises:
        PlanError: the orders know nothing of a target.
    """
    whole = all_units(config)

    def sort(target: str, layer: int | None, expert: int | None, units: tuple[int, ...]) -> tuple[int, ...]:
        return _most_important(orders, target, layer, expert, len(units)) if units and target in targets else units

    of_layers = {}
    for layer, units in whole.of_layers.items():
        kv_heads = sort("kv_heads", layer, None, units.kv_heads)
        heads = sort("attention_heads", layer, None, units.attention_heads)
        if len(units.kv_heads) == len(units.attention_heads):
            # Each head has its own keys and values: one order for both.
            kv_heads = heads = heads if "attention_heads" in targets else kv_heads
        experts = sort("experts", layer, None, units.experts)
        of_layers[layer] = LayerUnits(
            tuple(head for kv_head in kv_heads for head in heads_in_group(heads, kv_head, config)),
            kv_heads,
            sort("ffn", layer, None, units.ffn),
            experts,
            tuple(sort("expert_ffn", layer, expert, units.expert_ffn[expert]) for expert in experts),
        )
    return Units(sort("hidden_size", None, None, whole.hidden_size), whole.layers, of_layers)


def spread_over_layers(config: HuggingFaceModelConfig, units: Units, orders: Orders, step: int) -> Units:
    """Let layers share the same total of FFN channels by importance, each with a multiple of ``step``.

    Scores are made comparable by their mean and deviation in each layer (FLAP, arXiv:2312.11983); blocks of ``step``
    channels, from the least important on, are taken from the layer where their mean is lowest. Each layer keeps one
    block at least.
    """
    dense = [layer for layer, kept in units.kept_layers() if kept.ffn]
    total = config.architecture.ffn_size
    ascending, means = {}, {}
    for layer in dense:
        values = orders.values("ffn", layer, None, total)
        standard = (values - values.mean()) / values.std().clamp_min(torch.finfo(torch.float64).tiny)
        order = standard.argsort(stable=True)
        ascending[layer] = order.tolist()
        num_blocks = total // step
        # What does not fill a block goes first everywhere.
        means[layer] = standard[order][total - num_blocks * step :].view(num_blocks, step).mean(1).tolist()
    kept_blocks = sum(len(units.of_layers[layer].ffn) for layer in dense) // step
    removable = sorted((mean, layer) for layer in dense for mean in means[layer][:-1])
    num_removed = sum(len(means[layer]) for layer in dense) - kept_blocks
    removed = [layer for _, layer in removable[:num_removed]]
    for layer in dense:
        num_kept = (len(means[layer]) - removed.count(layer)) * step
        units = units.with_layer(layer, ffn=tuple(sorted(ascending[layer][total - num_kept :])))
    return units


def _layer_units(
    config: HuggingFaceModelConfig, layer: int, whole: LayerUnits, sizes: Sizes, orders: Orders
) -> LayerUnits:
    kv_heads, heads = _heads(config, layer, whole, sizes, orders)
    experts = _kept(orders, "experts", layer, None, whole.experts, sizes)
    return LayerUnits(
        heads,
        kv_heads,
        _kept(orders, "ffn", layer, None, whole.ffn, sizes),
        experts,
        tuple(_kept(orders, "expert_ffn", layer, expert, whole.expert_ffn[expert], sizes) for expert in experts),
    )


def _heads(
    config: HuggingFaceModelConfig, layer: int, whole: LayerUnits, sizes: Sizes, orders: Orders
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the KV heads that stay, and of each the same number of query heads."""
    if len(whole.kv_heads) == len(whole.attention_heads):
        # Each head has its own keys and values: they go together, by the scores of the heads where both are there.
        target = "attention_heads" if "attention_heads" in sizes else "kv_heads"
        heads = _kept(orders, target, layer, None, whole.attention_heads, sizes)
        return heads, heads
    kv_heads = _kept(orders, "kv_heads", layer, None, whole.kv_heads, sizes)
    in_group = len(whole.attention_heads) // len(whole.kv_heads)
    num_kept = sizes.get("attention_heads", in_group * len(kv_heads)) // len(kv_heads)
    if num_kept == in_group:
        return kv_heads, tuple(head for kv in kv_heads for head in heads_in_group(whole.attention_heads, kv, config))
    order = _most_important(orders, "attention_heads", layer, None, len(whole.attention_heads))
    chosen = (sorted(heads_in_group(order, kv_head, config)[:num_kept]) for kv_head in kv_heads)
    return kv_heads, tuple(head for heads in chosen for head in heads)


def _kept(
    orders: Orders, target: str, layer: int | None, expert: int | None, units: tuple[int, ...], sizes: Sizes
) -> tuple[int, ...]:
    size = sizes.get(target, len(units))
    if size >= len(units):
        return units
    return tuple(sorted(_most_important(orders, target, layer, expert, len(units))[:size]))


def _most_important(orders: Orders, target: str, layer: int | None, expert: int | None, size: int) -> tuple[int, ...]:
    """Return all units, the most important one first; of equal ones the one with the smaller number goes first."""
    ascending: list[int] = orders.values(target, layer, expert, size).argsort(stable=True).tolist()
    return tuple(reversed(ascending))
