"""Smaller models of tiny ones: a plan of every axis, and what transformers computes with it in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import megascore
from megascore.plans.choose import choose_units
from megascore.plans.model_size import model_size
from megascore.plans.orders import RandomOrders
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan, PlanRules, ScoresUsed
from megascore.plans.request import parse_request
from megascore.plans.sizes import resolve_sizes, sizes_of_parent
from tests.models import load_with_transformers

__all__ = ["exact", "random_plan", "scored", "wanted_sizes"]


def wanted_sizes(family: str, axis: str) -> dict[str, Any]:
    """Return what a plan asks for on one axis of a tiny model, or on "all" of them."""
    has_experts = family in ("mixtral", "qwen3_moe")
    one = {"hidden_size": 40, "layers": 3, "attention_heads": 2, "kv_heads": 1}
    one |= {} if family == "mixtral" else {"ffn": 56}
    one |= {"experts": "75%", "expert_ffn": "60%"} if has_experts else {}
    if axis != "all":
        return {axis: one[axis]}
    return {**one, "attention_heads": 1}


def random_plan(folder: Path, seed: int = 0, **wanted: Any) -> Plan:
    """Return a plan whose units were drawn at random, so that no order of a model can hide a mistake."""
    parent = Parent.of(folder)
    request = parse_request({"multiple_of": 8, **wanted})
    sizes = resolve_sizes(request, parent.config, parent.bytes_per_value)
    units = choose_units(parent.config, sizes, RandomOrders(seed))
    return Plan(
        str(folder),
        parent.config.architecture.model_type,
        parent.fingerprint,
        ScoresUsed("", ""),
        PlanRules(dict(request.multiples), request.tensor_parallel, request.expert_parallel, False),
        sizes_of_parent(parent.config),
        sizes,
        units,
        parent.size,
        model_size(parent.config, units, parent.bytes_per_value),
    )


def scored(folder: Path, *targets: str, seed: int = 0) -> megascore.Scores:
    """Return scores of a tiny model on random tokens."""
    model = load_with_transformers(folder, torch.float32)
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(seed))
    with megascore.attach(model, scores=[{"target": target} for target in targets]) as run:
        model(tokens)
        run.step()
        return run.finish()


def exact(folder: Path) -> nn.Module:
    """Return transformers' model in float64, with norms in float64 too: its own ones compute in float32."""
    model: nn.Module = load_with_transformers(
        folder, torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm.__get__(module)  # type: ignore[method-assign]
    return model


def _rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    normalized = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normalized
