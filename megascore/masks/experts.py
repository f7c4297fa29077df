"""Masks for routed experts and the channels inside of them, in Megatron-Core and in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megascore.errors import PlanError
from megascore.masks.hooks import Undo, mask_input
from megascore.plans.orders import EXPERT
from megascore.plans.units import LayerUnits
from megascore.sites.places import ModelView, Place
from megascore.sites.plain_experts import FusedExperts

__all__ = ["expert_channels_masked", "experts_masked"]


def experts_masked(view: ModelView, place: Place, kept: tuple[int, ...]) -> Iterator[Undo]:
    """Let the router of a layer choose among some of its experts.

    Args:
        view: The model.
        place: The layer's experts.
        kept: Global numbers of the experts that stay.

    Raises:
        PlanError: the router is of a kind that can't be masked.
    """
    num_experts = place.placement.shard.total
    if len(kept) == num_experts:
        return
    owner = place.local_name.rpartition(".")[0]
    modules: dict[str, nn.Module] = {}
    for number, chunk in enumerate(view.modules):
        prefix = f"{number}." if len(view.modules) > 1 else ""
        modules.update({f"{prefix}{name}": module for name, module in chunk.named_modules()})
    routers = [modules[f"{owner}.{name}"] for name in ("router", "gate") if f"{owner}.{name}" in modules]
    router: Any = routers[0] if routers else None
    if callable(getattr(router, "gating", None)):
        yield _mask_logits(router, num_experts, kept)
    elif FusedExperts.is_one(place.module) and isinstance(getattr(router, "weight", None), Tensor):
        yield from _keep_rows(router, place.module, num_experts, kept)
    else:
        raise PlanError(
            f"{place.local_name}: experts can't be masked, as no router of a known kind is beside them. Plan without "
            "experts, or prune the model and run that."
        )


def expert_channels_masked(place: Place, kept: LayerUnits) -> Iterator[Undo]:
    """Mask the inputs of one expert's output projection.

    Args:
        place: The projection of one expert.
        kept: What the layer keeps.

    Raises:
        PlanError: the experts are of a kind that can't be masked.
    """
    found = EXPERT.search(place.name)
    assert found is not None, place.name
    expert, shard = int(found[1]), place.placement.shard
    if expert not in kept.experts:
        return  # No token gets there.
    channels = kept.expert_ffn[kept.experts.index(expert)]
    if len(channels) == shard.total:
        return
    mask = torch.zeros(shard.total, dtype=torch.bool)
    mask[list(channels)] = True
    mask = mask[shard.offset :][: shard.length]
    module: Any = place.module
    if FusedExperts.is_one(module):
        # Nothing inside of the module can be reached, but for its weights.
        weight = module.down_proj
        yield _zero(weight[expert] if module.is_transposed else weight[expert].T, ~mask)
    elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2:
        yield mask_input(module, {shard.length: mask})
    elif isinstance(weight := _grouped_weight(module, place), Tensor):
        yield _zero(weight.T, ~mask)
    else:
        raise PlanError(
            f"{place.local_name} ({type(module).__name__}): channels of these experts can't be masked. Plan without "
            "expert_ffn, build the model with moe_grouped_gemm=False, or prune the model and run that."
        )


def _grouped_weight(module: Any, place: Place) -> Tensor | None:
    """Return one expert's weight in Transformer Engine's grouped linear layer: [out, in]."""
    found = EXPERT.search(place.name)
    num_local = getattr(module, "num_gemms", None)
    if found is None or not isinstance(num_local, int):
        return None
    weight: Tensor | None = getattr(module, f"weight{int(found[1]) % num_local}", None)
    return weight


def _zero(weight: Tensor, rows: Tensor) -> Undo:
    """Set rows of a view of a weight to zero."""
    rows = rows.to(weight.device)
    before = weight.detach()[rows].clone()
    with torch.no_grad():
        weight[rows] = 0

    def undo() -> None:
        with torch.no_grad():
            weight[rows] = before

    return undo


def _mask_logits(router: Any, num_experts: int, kept: tuple[int, ...]) -> Undo:
    """Let Megatron's router see the logits of other experts as the lowest that there are."""
    gating = router.gating
    gone = torch.ones(num_experts, dtype=torch.bool)
    gone[list(kept)] = False

    def masked(*args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = gating(*args, **kwargs)
        return logits.masked_fill(gone.to(logits.device), float("-inf"))

    router.gating = masked

    def undo() -> None:
        # The class's own method comes back.
        del router.gating

    return undo


def _keep_rows(router: Any, experts: nn.Module, num_experts: int, kept: tuple[int, ...]) -> Iterator[Undo]:
    """Let a router of transformers have the rows of the kept experts alone, and call them by their old numbers."""
    odd = [name for name, value in router.named_buffers() if len(value) == num_experts]
    if odd:
        raise PlanError(
            f"{type(router).__name__} has the buffers {', '.join(odd)}: experts of such a router can't be masked here. "
            "Load the model into Megatron-Core, or prune it and run that."
        )
    index = torch.tensor(kept)
    before = {name: value for name, value in router.named_parameters(recurse=False) if len(value) == num_experts}
    for name, value in before.items():
        rows = value.detach()[index.to(value.device)].clone()
        setattr(router, name, nn.Parameter(rows, requires_grad=value.requires_grad))

    def restore() -> None:
        for name, value in before.items():
            setattr(router, name, value)

    yield restore

    def renumber(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given, named = list(args), dict(kwargs)
        if len(given) > 1:
            given[1] = index.to(given[1].device)[given[1]]
        else:
            key = next(name for name in ("top_k_index", "router_indices") if name in named)
            named[key] = index.to(named[key].device)[named[key]]
        return tuple(given), named

    yield experts.register_forward_pre_hook(renumber, with_kwargs=True).remove
