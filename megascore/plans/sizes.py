"""From what is asked for to sizes: percentages, multiples, parallel axes, budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megascore.errors import PlanError
from megascore.plans.model_size import kv_cache_bytes, model_size
from megascore.plans.request import PlanRequest
from megascore.plans.units import LayerUnits, Units, experts_per_token
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.families import FAMILIES

__all__ = ["LayersKept", "check_sizes", "resolve_sizes", "sizes_of_parent"]

ORDER = ("layers", "ffn", "kv_heads", "attention_heads", "hidden_size", "experts", "expert_ffn")
"""Heads behind KV heads, whose number they depend on, and the hidden size behind heads."""


def sizes_of_parent(config: HuggingFaceModelConfig) -> dict[str, int]:
    """Return how many units a model has, by target; those that it has none of are left out."""
    model = config.architecture
    experts = model.experts
    sizes = {
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "kv_heads": model.num_kv_heads,
        "attention_heads": model.num_heads,
    }
    if experts is None or not all(experts.layers):
        sizes["ffn"] = model.ffn_size
    if experts is not None:
        sizes |= {"experts": experts.num_experts, "expert_ffn": experts.ffn_size}
    return sizes


LayersKept = Callable[[int], Sequence[int]]
"""Says which layers stay, of so many; a smaller number is part of a larger one."""


def resolve_sizes(
    request: PlanRequest,
    config: HuggingFaceModelConfig,
    bytes_per_value: int,
    layers_kept: LayersKept | None = None,
) -> dict[str, int]:
    """Return how many units the smaller model has, of every target that the model has.

    Sizes that are asked for as parts become the nearest one that the rules allow; of a budget the largest that meets it
    is taken, with the same part of each of its axes.

    Args:
        request: What is asked for.
        config: The parent.
        bytes_per_value: Of the checkpoint's type.
        layers_kept: Which layers a budget is counted with, where layers differ in size; None for any.

    Raises:
        PlanError: a target that the model does not have, a size that the rules do not allow, or a budget that can't be
            met.
    """
    parent, request = sizes_of_parent(config), _with_heads_together(request, config)
    for target in (*request.widths, *(request.axes or ())):
        if target not in parent:
            raise PlanError(f"{target}: the model has none; it has {', '.join(parent)}.")
    sizes: dict[str, int] = {}
    for target in ORDER:
        if target in parent:
            wanted = request.widths.get(target, parent[target] if target != "attention_heads" else None)
            sizes[target] = _resolved(target, wanted, request, config, sizes)
    return sizes if request.budget is None else _meet_budget(request, config, bytes_per_value, sizes, layers_kept)


def check_sizes(sizes: Mapping[str, int], config: HuggingFaceModelConfig, request: PlanRequest) -> None:
    """Refuse sizes that the rules do not allow, as of a plan that somebody has edited.

    Raises:
        PlanError: naming target, size, rule and the nearest sizes that would do.
    """
    done: dict[str, int] = {}
    for target in ORDER:
        if target in sizes:
            done[target] = _resolved(target, sizes[target], request, config, done)


def _with_heads_together(request: PlanRequest, config: HuggingFaceModelConfig) -> PlanRequest:
    """Ask for both kinds of heads where each head has keys and values of its own, and one kind is asked for."""
    both = ("attention_heads", "kv_heads")
    if config.architecture.num_heads != config.architecture.num_kv_heads:
        return request
    widths, axes = dict(request.widths), request.axes
    given = [widths[target] for target in both if target in widths]
    if len(set(given)) > 1:
        raise PlanError(
            f"attention_heads={given[0]} and kv_heads={given[1]}: in this model each head has keys and values of its "
            "own, so give one of them."
        )
    if given:
        widths = {**widths, **dict.fromkeys(both, given[0])}
    if axes is not None and set(axes) & set(both):
        axes = tuple(dict.fromkeys((*axes, *both)))
    return replace(request, widths=widths, axes=axes)


def _resolved(
    target: str, wanted: float | int | None, request: PlanRequest, config: HuggingFaceModelConfig, sizes: dict[str, int]
) -> int:
    total = sizes_of_parent(config)[target]
    allowed = _allowed(target, request, config, sizes)
    if wanted is None:
        # As many query heads for each KV head as before.
        wanted = total // config.architecture.num_kv_heads * sizes["kv_heads"]
    if isinstance(wanted, float):
        return min(allowed, key=lambda size: (abs(size - wanted * total), size))
    if wanted in allowed:
        return wanted
    if wanted > total:
        raise PlanError(f"{target}={wanted}: the model has {total}.")
    below = [size for size in allowed if size < wanted][-1:]
    above = [size for size in allowed if size > wanted][:1]
    near = " or ".join(str(size) for size in (*below, *above)) or "none"
    raise PlanError(f"{target}={wanted}: {_rule(target, request, config, sizes)}; near it: {near}.")


def _allowed(target: str, request: PlanRequest, config: HuggingFaceModelConfig, sizes: dict[str, int]) -> list[int]:
    """Return the sizes that the rules allow, ascending; the size of the parent only where the layout divides it.

    Raises:
        PlanError: there are none.
    """
    total = sizes_of_parent(config)[target]
    tensor = request.tensor_parallel

    def is_multiple(size: int) -> bool:
        return size == total or size % request.multiples[target] == 0

    heads = sizes.get("attention_heads", 1) if _hidden_goes_with_heads(config) else 1
    rules: dict[str, Callable[[int], bool]] = {
        "layers": lambda size: True,
        "hidden_size": lambda size: is_multiple(size) and size % heads == 0,
        "ffn": lambda size: is_multiple(size) and size % tensor == 0,
        "expert_ffn": is_multiple,
        # Megatron gives each rank a copy where there are more ranks than KV heads.
        "kv_heads": lambda size: size % tensor == 0 or tensor % size == 0,
        "attention_heads": lambda size: (
            size % tensor == 0 and size % sizes["kv_heads"] == 0 and size // sizes["kv_heads"] <= _in_group(config)
        ),
        "experts": lambda size: size % request.expert_parallel == 0 and size >= experts_per_token(config),
    }
    allowed = [size for size in range(1, total + 1) if rules[target](size)]
    if not allowed:
        raise PlanError(f"{target}: no size up to {total} will do: {_rule(target, request, config, sizes)}.")
    return allowed


def _rule(target: str, request: PlanRequest, config: HuggingFaceModelConfig, sizes: dict[str, int]) -> str:
    by_tensor = f"tensor_parallel={request.tensor_parallel}"
    multiple = f"it must be a multiple of {request.multiples.get(target, 1)} (multiple_of.{target})"
    and_heads = (
        f" and of the {sizes.get('attention_heads', '?')} attention heads, as transformers asks of this family"
        if _hidden_goes_with_heads(config)
        else ""
    )
    return {
        "layers": "there is one layer at least",
        "hidden_size": f"{multiple}{and_heads}",
        "ffn": f"{multiple} that {by_tensor} divides",
        "expert_ffn": multiple,
        "kv_heads": f"{by_tensor} must divide it, or be a multiple of it",
        "attention_heads": (
            f"each of the {sizes.get('kv_heads', '?')} KV heads must have the same number of them, at most "
            f"{_in_group(config)}, and {by_tensor} must divide them"
        ),
        "experts": (
            f"expert_parallel={request.expert_parallel} must divide it, and each token goes to "
            f"{experts_per_token(config)}"
        ),
    }[target]


def _hidden_goes_with_heads(config: HuggingFaceModelConfig) -> bool:
    return FAMILIES[config.architecture.model_type].hidden_multiple_of_heads


def _in_group(config: HuggingFaceModelConfig) -> int:
    return config.architecture.num_heads // config.architecture.num_kv_heads


def _meet_budget(
    request: PlanRequest,
    config: HuggingFaceModelConfig,
    bytes_per_value: int,
    fixed: dict[str, int],
    layers_kept: LayersKept | None,
) -> dict[str, int]:
    assert request.budget is not None
    name, most = request.budget
    axes = request.axes or tuple(t for t in ("ffn", "expert_ffn") if t in fixed and t not in request.widths)
    if not axes:
        raise PlanError(
            f"{name}: the sizes of all FFN channels are given, so nothing is left to meet it with: name axes."
        )

    def sizes_at(part: float) -> dict[str, int]:
        sizes = dict(fixed)
        for target in (target for target in ORDER if target in axes or target == "attention_heads"):
            if target not in axes and "kv_heads" not in axes:
                continue
            allowed = _allowed(target, request, config, sizes)
            whole = _resolved(target, None, request, config, sizes) if target == "attention_heads" else fixed[target]
            most_units = (part if target in axes else 1.0) * whole
            sizes[target] = next((size for size in reversed(allowed) if size <= most_units + 1e-9), allowed[0])
        return sizes

    def cost_at(part: float) -> float:
        sizes = sizes_at(part)
        layers = range(sizes["layers"]) if layers_kept is None else layers_kept(sizes["layers"])
        units = _first_units(sizes, layers, config)
        size = model_size(config, units, bytes_per_value)
        if name == "memory":
            return size.bytes + kv_cache_bytes(config, units, bytes_per_value, request.batch, request.length)
        return {"params": size.parameters, "active_params": size.active_parameters}[name]

    parts = sorted(
        {1.0, *(size / fixed[axis] for axis in axes for size in _allowed(axis, request, config, dict(fixed)))}
    )
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost_at(parts[middle]) <= most else (low, middle)
    if low == 0:
        raise PlanError(
            f"{name}={most:.6g} can't be met by {', '.join(axes)} alone: at their smallest the model still has "
            f"{cost_at(parts[0]):.6g}. Name more axes, such as axes=ffn,hidden_size,layers, or give sizes."
        )
    return sizes_at(parts[low - 1])


def _first_units(sizes: Mapping[str, int], layers: Sequence[int], config: HuggingFaceModelConfig) -> Units:
    """Return units of these sizes in these layers, whichever they are: enough to count."""
    experts = config.architecture.experts
    heads, kv_heads = tuple(range(sizes["attention_heads"])), tuple(range(sizes["kv_heads"]))
    dense = LayerUnits(heads, kv_heads, tuple(range(sizes.get("ffn", 0))))
    routed = dense
    if experts is not None:
        kept = tuple(range(sizes["experts"]))
        routed = LayerUnits(heads, kv_heads, (), kept, (tuple(range(sizes["expert_ffn"])),) * len(kept))
    of_layers = {layer: routed if experts is not None and experts.layers[layer] else dense for layer in layers}
    return Units(tuple(range(sizes["hidden_size"])), tuple(layers), of_layers)
