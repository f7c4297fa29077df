"""A plan for a smaller model: which units stay, by what they were ranked, how large it is before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megascore.errors import PlanError
from megascore.plans.choose import choose_layers, choose_units, spread_over_layers
from megascore.plans.model_size import ModelSize, kv_cache_bytes, model_size
from megascore.plans.orders import ScoreOrders
from megascore.plans.parent import Parent
from megascore.plans.request import PlanRequest, parse_request
from megascore.plans.sizes import resolve_sizes, sizes_of_parent
from megascore.plans.units import Units
from megascore.plans.warnings import warnings_of
from megascore.scores.score_file import Scores, load_scores
from megascore.scores.uncertainty import overlaps

__all__ = ["Plan", "PlanRules", "ScoresUsed", "make_plan", "plan", "plan_for"]

logger = logging.getLogger(__name__)

WHO_LOADS_PER_LAYER = (
    "layers keep different numbers of channels. Megatron-Core's heterogeneous layer specs load such a model "
    "(heterogeneous_layers_config_path); transformers and vLLM load none "
    "of this family whose layers differ, so 'megascore prune' refuses this plan for a Hugging Face folder. "
    "megascore.masked_units and 'megascore evaluate' take it."
)


@dataclass(frozen=True)
class PlanRules:
    """What the sizes were made to fit, and are checked against when a plan is read."""

    multiple_of: Mapping[str, int]
    """By target, of the targets that are channels."""
    tensor_parallel: int
    expert_parallel: int
    per_layer: bool


@dataclass(frozen=True)
class ScoresUsed:
    """The score file behind a plan."""

    path: str
    """Where it was; empty for scores that were in memory."""
    sha256: str
    """Of its bytes."""
    methods: Mapping[str, str] = field(default_factory=dict)
    """What ranked each target."""
    overlaps: Mapping[str, float] = field(default_factory=dict)
    """Expected part of the lowest quarter of each target that another such run would agree on, where it is known."""


@dataclass(frozen=True)
class Plan:
    """Which units of one model stay."""

    model: str
    """Folder of the parent, as it was called."""
    model_type: str
    weights_fingerprint: str
    """Of the parent's weights."""
    scores: ScoresUsed
    rules: PlanRules
    sizes_before: Mapping[str, int]
    """Units of the parent, by target."""
    sizes_after: Mapping[str, int]
    """Units that stay; of ffn the average where layers differ."""
    units: Units
    before: ModelSize
    after: ModelSize
    warnings: tuple[str, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the plan as YAML; it appears whole or not at all. Not collective.

        Raises:
            ScoreFileError: a file is there and `overwrite` is false, or it can't be written.
        """
        from megascore.plans.plan_file import write_plan

        write_plan(self, path, overwrite)


def plan(scores: Scores | str | Path, **wanted: Any) -> Plan:
    """Return a plan for a smaller model.

    Args:
        scores: A score file or its path.
        wanted: Sizes by target (``ffn="75%"``, ``layers=24``), or a budget (``params=6e9``, ``active_params=...``,
            ``memory="40GiB"`` with ``batch`` and ``length``) and the ``axes`` that meet it; ``multiple_of`` (64),
            ``tensor_parallel``, ``expert_parallel``, ``per_layer``; ``methods={target: method}`` where the file has
            several; ``model``, the Hugging Face folder of the scored model (that which the file names), and
            ``same_weights=True`` where its fingerprint can't be compared.

    Raises:
        PlanError: what is asked for can't be, or the scores are not of this model.
        ModelError: the folder is no checkpoint of a known family.
        ScoreFileError: the score file can't be read.
    """
    methods = wanted.pop("methods", {})
    return make_plan(scores, parse_request({**wanted, **{f"method.{target}": m for target, m in methods.items()}}))


def make_plan(scores: Scores | str | Path, request: PlanRequest) -> Plan:
    """Return a plan; see `plan`."""
    path = "" if isinstance(scores, Scores) else str(scores)
    found = scores if isinstance(scores, Scores) else load_scores(scores)
    parent = Parent.of(request.model or _model_of(found))
    parent.check_scores(found, request.same_weights)
    return plan_for(found, path, parent, request)


def plan_for(found: Scores, path: str, parent: Parent, request: PlanRequest) -> Plan:
    """Return a plan by scores that were read, for a model that they are of.

    Args:
        found: The scores.
        path: Where they are; empty for scores in memory.
        parent: The model.
        request: What is asked for.

    Raises:
        PlanError: what is asked for can't be.
    """
    config, request = parent.config, _with_absolute_budget(request, parent)
    orders = ScoreOrders(found, request.methods)
    sizes = resolve_sizes(request, config, parent.bytes_per_value, lambda number: choose_layers(config, number, orders))
    before = sizes_of_parent(config)
    if sizes == before and not request.per_layer:
        raise PlanError(
            f"by the rules nothing goes: every size stays what it is ({_sizes_text(sizes)}). Ask for less, or for a "
            f"finer multiple_of."
        )
    units = choose_units(config, sizes, orders)
    orders.check_kept("layers", sizes["layers"])
    if request.per_layer:
        units = _spread(parent, request, units, orders)
    after = model_size(config, units, parent.bytes_per_value)
    return Plan(
        model=str(parent.folder),
        model_type=config.architecture.model_type,
        weights_fingerprint=parent.fingerprint,
        scores=ScoresUsed(path, found.fingerprint(), dict(orders.methods), _overlaps(found, orders.methods)),
        rules=PlanRules(dict(request.multiples), request.tensor_parallel, request.expert_parallel, request.per_layer),
        sizes_before=before,
        sizes_after=sizes,
        units=units,
        before=parent.size,
        after=after,
        warnings=(
            *warnings_of(found, config, sizes, units, orders),
            *([WHO_LOADS_PER_LAYER] if request.per_layer else []),
        ),
    )


def _overlaps(found: Scores, methods: Mapping[str, str]) -> dict[str, float]:
    known = overlaps(found.uncertainty)
    names = {target: f"{target}/{method}" for target, method in methods.items()}
    return {target: round(known[name], 4) for target, name in names.items() if name in known}


def _spread(parent: Parent, request: PlanRequest, units: Units, orders: ScoreOrders) -> Units:
    experts = parent.config.architecture.experts
    if experts is not None:
        raise PlanError(
            "per_layer=true: nothing loads a model with experts whose layers differ. Leave it out, or plan a dense "
            "model."
        )
    step = request.multiples["ffn"]
    if step % request.tensor_parallel:
        raise PlanError(
            f"per_layer=true: tensor_parallel={request.tensor_parallel} must divide multiple_of={step}, "
            "as each layer keeps a multiple of it."
        )
    return spread_over_layers(parent.config, units, orders, step)


def _with_absolute_budget(request: PlanRequest, parent: Parent) -> PlanRequest:
    """Return a request whose budget is a number, where it was a part of what the parent has."""
    if request.budget is None or request.budget[1] >= 1:
        return request
    name, part = request.budget
    return replace(request, budget=(name, part * _cost(name, parent, parent.units, parent.size, request)))


def _cost(name: str, parent: Parent, units: Units, size: ModelSize, request: PlanRequest) -> int:
    """Return what a model comes to in terms of a budget."""
    if name == "memory":
        cache = kv_cache_bytes(parent.config, units, parent.bytes_per_value, request.batch, request.length)
        return size.bytes + cache
    return {"params": size.parameters, "active_params": size.active_parameters}[name]


def _model_of(scores: Scores) -> str:
    model = scores.metadata.get("model", {})
    # attach() knows the name alone, which transformers makes the folder.
    name = model.get("path", model.get("name"))
    if isinstance(name, str) and (Path(name) / "config.json").is_file():
        return name
    raise PlanError(
        f"the score file is of the model {name!r}, which is no Hugging Face folder here: name it, model=FOLDER."
    )


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{target} {size}" for target, size in sizes.items())
