"""A plan as YAML that a person reads and edits; what is left out of ``kept`` stays whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megascore.errors import PlanError
from megascore.files.output_path import write_output
from megascore.plans.model_size import model_size
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan, PlanRules, ScoresUsed
from megascore.plans.ranges import parse_ranges, ranges_text
from megascore.plans.request import CHANNELS, PlanRequest
from megascore.plans.sizes import check_sizes, sizes_of_parent
from megascore.plans.units import LayerUnits, Units, all_units, check_units

__all__ = ["as_document", "load_plan", "plan_of_document", "read_plan", "write_plan"]

VERSION = 1
HEADER = """\
# A plan of megascore: which units of a model stay. Numbers are those of the parent, counted from 0; what is left out of
# 'kept' stays whole. After an edit, 'sizes' must say what 'kept' keeps; 'size' is for people and is counted again.
"""
LAYER_TARGETS = ("attention_heads", "kv_heads", "ffn", "experts")


def write_plan(plan: Plan, path: str | Path, overwrite: bool) -> None:
    """Write a plan whole or not at all.

    Raises:
        ScoreFileError: a file is there and ``overwrite`` is false, or it can't be written.
    """
    text = yaml.safe_dump(as_document(plan), sort_keys=False, width=10**6, allow_unicode=True)
    write_output(path, (HEADER + text).encode(), overwrite, "--overwrite")


def as_document(plan: Plan) -> dict[str, Any]:
    """Return a plan as YAML and JSON have it."""
    return {
        "megascore_plan": VERSION,
        "model": {"path": plan.model, "type": plan.model_type, "weights_fingerprint": plan.weights_fingerprint},
        "scores": {
            "path": plan.scores.path,
            "sha256": plan.scores.sha256,
            "methods": dict(plan.scores.methods),
            "overlaps": dict(plan.scores.overlaps),
        },
        "rules": {**vars(plan.rules), "multiple_of": dict(plan.rules.multiple_of)},
        "sizes": {
            target: {"before": before, "after": plan.sizes_after[target]}
            for target, before in plan.sizes_before.items()
        },
        "size": {"before": plan.before.as_json(), "after": plan.after.as_json()},
        "warnings": list(plan.warnings),
        "kept": _kept_document(plan),
    }


def load_plan(path: str | Path, model: str | Path | None = None) -> Plan:
    """Read a plan and check it against its model, of which headers and samples are read.

    Args:
        path: The file.
        model: Hugging Face folder of the model; None for the one that the plan names.

    Raises:
        PlanError: it can't be read, is of another model, or does not fit: naming the size and the rule.
        ModelError: the folder is no whole checkpoint of a known family.
    """
    if model is None:
        entry = _load(str(path)).get("model")
        model = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(model, str) or not (Path(model) / "config.json").is_file():
            raise PlanError(f"{path} is for the model {model!r}, which is no Hugging Face folder here: name it.")
    return read_plan(path, Parent.of(model))


def read_plan(path: str | Path, parent: Parent) -> Plan:
    """Read a plan and check it against the model that it is for.

    Args:
        path: The file.
        parent: The model.

    Raises:
        PlanError: it can't be read, is of another model, or does not fit: naming the size and the rule.
    """
    where = str(path)
    return plan_of_document(where, _load(where), parent)


def plan_of_document(where: str, document: Any, parent: Parent) -> Plan:
    """Return the plan of a parsed file, checked against its model.

    Args:
        where: The file, for errors.
        document: As `as_document` returns it.
        parent: The model.

    Raises:
        PlanError: as `read_plan`.
    """
    config = parent.config
    try:
        before = {target: _count(entry["before"]) for target, entry in document["sizes"].items()}
        after = {target: _count(entry["after"]) for target, entry in document["sizes"].items()}
        rules = PlanRules(**document["rules"])
        scores = ScoresUsed(**document["scores"])
        fingerprint = str(document["model"]["weights_fingerprint"])
        warnings = tuple(str(text) for text in document.get("warnings") or ())
        request = PlanRequest(
            multiples={target: _count(rules.multiple_of[target]) for target in CHANNELS},
            tensor_parallel=_count(rules.tensor_parallel),
            expert_parallel=_count(rules.expert_parallel),
            per_layer=bool(rules.per_layer),
        )
        kept = document.get("kept") or {}
        by_layer = dict(kept.get("by_layer") or {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlanError(f"{where} is no whole plan ({error!r}): make it again with 'megascore plan'.") from error
    if before != sizes_of_parent(config):
        raise PlanError(
            f"{where} is for a model with {before}, and {parent.folder} has {sizes_of_parent(config)}: name the model "
            "that the plan was made for."
        )
    if fingerprint != parent.fingerprint:
        raise PlanError(
            f"{where} is for weights with the fingerprint {fingerprint[:12]}..., and those of {parent.folder} have "
            f"{parent.fingerprint[:12]}...: name the model that the plan was made for."
        )
    units = _units(where, kept, by_layer, parent)
    check_units(units, config, where)
    check_sizes(after, config, request)
    _check_against_sizes(where, units, after, rules)
    return Plan(
        str(parent.folder),
        config.architecture.model_type,
        fingerprint,
        scores,
        rules,
        before,
        after,
        units,
        parent.size,
        model_size(config, units, parent.bytes_per_value),
        warnings,
    )


def _load(where: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(where).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"plan {where} not found: give the path of a file that 'megascore plan' wrote.") from error
    except OSError as error:
        raise PlanError(f"plan {where} can't be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PlanError(f"plan {where} is no YAML: {' '.join(str(error).split())[:300]}.") from error
    if not isinstance(document, dict) or "megascore_plan" not in document:
        raise PlanError(f"{where} is no plan: expected a file that 'megascore plan' wrote.")
    if document["megascore_plan"] != VERSION:
        raise PlanError(
            f"{where} is a plan of version {document['megascore_plan']}; this megascore reads version {VERSION}: "
            "update megascore, or make it again."
        )
    return document


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no number of at least 1")
    return value


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _kept_document(plan: Plan) -> dict[str, Any]:
    units, before = plan.units, plan.sizes_before
    kept: dict[str, Any] = {}
    for target, numbers in (("hidden_size", units.hidden_size), ("layers", units.layers)):
        if len(numbers) < before[target]:
            kept[target] = ranges_text(numbers)
    by_layer: dict[int, dict[str, Any]] = {}
    for layer, of_layer in units.kept_layers():
        entry: dict[str, Any] = {
            target: ranges_text(numbers)
            for target in LAYER_TARGETS
            if (numbers := getattr(of_layer, target)) and len(numbers) < before[target]
        }
        if of_layer.experts and any(len(channels) < before["expert_ffn"] for channels in of_layer.expert_ffn):
            entry["expert_ffn"] = {
                expert: ranges_text(channels)
                for expert, channels in zip(of_layer.experts, of_layer.expert_ffn, strict=True)
            }
        if entry:
            by_layer[layer] = entry
    return {**kept, **({"by_layer": by_layer} if by_layer else {})}


def _units(where: str, kept: Mapping[str, Any], by_layer: Mapping[Any, Any], parent: Parent) -> Units:
    whole = all_units(parent.config)
    unknown = set(kept) - {"hidden_size", "layers", "by_layer"}
    if unknown:
        raise PlanError(f"{where}: kept has {sorted(unknown)}: expected hidden_size, layers and by_layer.")

    def numbers(name: str, entry: Mapping[str, Any], target: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return parse_ranges(entry[target], f"{where}: {name}{target}") if target in entry else default

    layers = numbers("", kept, "layers", whole.layers)
    # JSON knows texts alone as keys.
    by_layer = {_number(key): entry for key, entry in by_layer.items()}
    alone = sorted(str(layer) for layer in by_layer if layer not in layers)
    if alone:
        raise PlanError(f"{where}: by_layer has the layers {', '.join(alone[:5])}, which 'layers' does not keep.")
    of_layers = {}
    for layer in layers:
        entry, name = by_layer.get(layer) or {}, f"layer {layer}: "
        if layer not in whole.of_layers:
            raise PlanError(f"{where}: layers keeps {layer}, and the model has those up to {len(whole.layers) - 1}.")
        if not isinstance(entry, Mapping) or set(entry) - {*LAYER_TARGETS, "expert_ffn"}:
            raise PlanError(f"{where}: {name}expected a mapping of {', '.join(LAYER_TARGETS)} and expert_ffn.")
        parent_units = whole.of_layers[layer]
        values = {target: numbers(name, entry, target, getattr(parent_units, target)) for target in LAYER_TARGETS}
        given = entry.get("expert_ffn") or {}
        channels = {_number(key): text for key, text in given.items()} if isinstance(given, Mapping) else given
        if not isinstance(channels, Mapping) or set(channels) - set(values["experts"]):
            raise PlanError(f"{where}: {name}expert_ffn must be a mapping with kept experts as keys.")
        all_channels = tuple(range(parent.config.architecture.experts.ffn_size)) if values["experts"] else ()  # type: ignore[union-attr]  # a layer with experts is of a model with experts
        of_layers[layer] = LayerUnits(
            **values,
            expert_ffn=tuple(
                numbers(f"{name}expert ", channels, expert, all_channels)  # type: ignore[arg-type]  # keys are numbers
                for expert in values["experts"]
            ),
        )
    return Units(numbers("", kept, "hidden_size", whole.hidden_size), layers, of_layers)


def _check_against_sizes(where: str, units: Units, after: Mapping[str, int], rules: PlanRules) -> None:
    if rules.per_layer:
        for layer, kept in units.kept_layers():
            if len(kept.ffn) % rules.multiple_of["ffn"]:
                raise PlanError(
                    f"{where}: layer {layer} keeps {len(kept.ffn)} channels: expected a multiple of "
                    f"rules.multiple_of.ffn={rules.multiple_of['ffn']}."
                )
    for target, found in units.sizes().items():
        if not found or (target == "ffn" and rules.per_layer):
            continue
        if found != {after[target]}:
            raise PlanError(
                f"{where}: sizes says {target} {after[target]}, and 'kept' keeps {sorted(found)}: make them agree, "
                "equally many in each layer."
            )
