"""A smaller Hugging Face folder from a larger one and a plan: no model is built, one tensor at a time is in memory."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from megascore.errors import PlanError
from megascore.files.json_text import parse_json
from megascore.files.whole import temporary_name
from megascore.plans.choose import sorted_units
from megascore.plans.kept_tensors import KeptTensor, kept_tensors
from megascore.plans.orders import ScoreOrders
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan
from megascore.plans.plan_file import as_document, read_plan
from megascore.plans.units import Units
from megascore.pruning.config_json import smaller_config, smaller_config_json
from megascore.pruning.other_files import copy_other_files
from megascore.pruning.pick import Picker
from megascore.pruning.tensor_stream import Planned, write_tensors
from megascore.scores.score_file import load_scores
from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.folder import INDEX, SINGLE, StoredTensor
from megascore.weights.huggingface.sources import all_tensors, is_known_extra

__all__ = ["RECORD", "Replaced", "check_output", "prune"]

logger = logging.getLogger(__name__)

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Replaced: TypeAlias = Callable[[str, int], "Tensor | None"]
"""Takes the name of a tensor of the parent (with ``#`` and an expert's number where all experts are in one) and its
layer; returns the smaller model's values, in its shape, or None where they are the parent's."""

RECORD = "megascore_prune.json"
"""What was done, beside the weights."""


def prune(
    folder: str | Path,
    plan: Plan | str | Path,
    output: str | Path,
    *,
    sort_only: bool = False,
    scores: str | Path | None = None,
    replaced: Replaced | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write the smaller model of a plan; the folder appears whole or not at all, and the input is never changed.

    Not collective: call it on one rank. Weights keep their types; tokenizer and other files come along.

    Args:
        folder: The parent, a Hugging Face folder.
        plan: What stays, or the file that says it.
        output: Folder to write; none is there.
        sort_only: Keep everything, with the most important units first: the model computes the same as before, and
            each smaller one of the same order is a prefix of it. Sorted is what the plan has methods for, but for
            layers.
        scores: The score file behind the plan, for ``sort_only``; None for the path that the plan names.
        replaced: Returns what takes the place of a tensor of the parent, cut already; see `Replaced`.
        record: Further entries for ``megascore_prune.json``.

    Raises:
        PlanError: the plan is damaged, of another model, or can't be expressed in config.json; something is there
            already, or the disk is full.
        ModelError: the parent is no whole checkpoint of a known family.
    """
    # Tensors that nobody knows are refused below, so a warning would say it twice.
    parent, target = Parent.of(folder, warn=False), Path(output)
    check_output(target)
    wanted = plan if isinstance(plan, Plan) else read_plan(plan, parent)
    if wanted.weights_fingerprint != parent.fingerprint:
        raise PlanError(f"the plan is for {wanted.model}, and {parent.folder} has other weights: name that model.")
    units = _sorted(parent, wanted, scores) if sort_only else wanted.units
    if not units.is_uniform:
        raise PlanError(
            "the plan keeps different numbers of units in different layers, and config.json of a "
            f"{wanted.model_type} has one number for all: plan without per_layer=true, or load such a model with "
            "Megatron-Core's heterogeneous layer specs."
        )
    _refuse_unknown_tensors(parent)
    config = smaller_config(parent.config, units)
    tensors = kept_tensors(parent.config, units)
    raw = parse_json((parent.folder / "config.json").read_text(encoding="utf-8"))
    new_json = smaller_config_json(raw, parent.config, units)
    with _new_folder(target) as temporary:
        _write_json(temporary / "config.json", new_json)
        found = read_config(temporary)
        # Experts fused into one tensor are told by tensors, not by config.json.
        found = replace(found, fused_experts=config.fused_experts, expert_names=config.expert_names)
        if "ffn" not in wanted.sizes_before:
            found = replace(found, architecture=replace(found.architecture, ffn_size=config.architecture.ffn_size))
        if found != config:
            raise PlanError(
                f"config.json of a {wanted.model_type} can't express the plan: it would be read as "
                f"{found.architecture}, and {config.architecture} is meant."
            )
        _write_weights(parent, tensors, temporary, replaced)
        copy_other_files(parent.folder, temporary)
        text = json.dumps({**_record(parent, wanted, units, sort_only), **(record or {})}, ensure_ascii=False)
        (temporary / RECORD).write_text(text + "\n", encoding="utf-8")
        HuggingFaceCheckpoint(read_config(temporary), temporary).check()


def check_output(output: str | Path) -> None:
    """Refuse a folder that is there. Not collective.

    Raises:
        PlanError: naming it.
    """
    if os.path.lexists(output):
        raise PlanError(f"{output} exists already: give the path of a new folder.")


def _sorted(parent: Parent, plan: Plan, scores: str | Path | None) -> Units:
    path = scores if scores is not None else plan.scores.path
    if not path:
        raise PlanError("the plan was made of scores in memory, so their file must be named to sort by (--scores).")
    found = load_scores(path)
    if found.fingerprint() != plan.scores.sha256:
        raise PlanError(f"{path} is not the score file that the plan was made of: name that one (--scores).")
    orders = ScoreOrders(found, plan.scores.methods)
    return sorted_units(parent.config, orders, set(plan.scores.methods) - {"layers"})


def _refuse_unknown_tensors(parent: Parent) -> None:
    known, stored = all_tensors(parent.config), parent.checkpoint.folder.tensors
    unknown = sorted(name for name in stored if name not in known and not is_known_extra(name, parent.config))
    if unknown:
        raise PlanError(
            f"{parent.folder} has {len(unknown)} tensors that no {parent.config.architecture.model_type} is known to "
            f"have, such as {', '.join(unknown[:3])}: what should become of them can't be told. Save the model without."
        )


def _blocks(picker: Picker, tensor: KeptTensor, stored: StoredTensor, replaced: Replaced | None) -> Iterator[Tensor]:
    """Yield the values of a tensor of the smaller model: what stays of the parent's, or what takes its place."""
    name, layer = tensor.source.name, tensor.source.layer
    if replaced is None or layer is None:
        yield from picker.blocks(tensor, name)
        return
    # Where all experts are in one tensor, each may have its own.
    parts = [(f"{name}#{entry[0]}", replace(tensor, experts=(entry,))) for entry in tensor.experts or ()]
    for part_name, part in parts or [(name, tensor)]:
        values = replaced(part_name, layer)
        if values is None:
            yield from picker.blocks(part, name)
        else:
            yield values.to(TORCH_TYPES[stored.dtype])


def _write_weights(parent: Parent, tensors: list[KeptTensor], folder: Path, replaced: Replaced | None) -> None:
    """Write the weights into as many files as the parent has, as far as something of each is left."""
    stored = parent.checkpoint.folder.tensors
    files: dict[Path, dict[str, KeptTensor]] = {}
    for tensor in tensors:
        files.setdefault(stored[tensor.source.name].path, {})[tensor.name] = tensor
    total, weight_map = len(files), {}
    num_bytes = 0
    with Picker(stored) as picker:
        for number, path in enumerate(sorted(files), start=1):
            name = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            group = files[path]
            planned = {key: Planned(stored[t.source.name].dtype, t.shape) for key, t in group.items()}

            def make(key: str, group: dict[str, KeptTensor] = group) -> Iterator[Tensor]:
                tensor = group[key]
                return _blocks(picker, tensor, stored[tensor.source.name], replaced)

            write_tensors(folder / name, planned, make)
            weight_map.update(dict.fromkeys(planned, name))
            num_bytes += sum(one.num_bytes for one in planned.values())
    if total > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)


def _record(parent: Parent, plan: Plan, units: Units, sort_only: bool) -> dict[str, Any]:
    return {
        "parent": {"path": str(parent.folder), "weights_fingerprint": parent.fingerprint},
        "sort_only": sort_only,
        "plan": as_document(plan),
        "old_indices": {
            "hidden_size": list(units.hidden_size),
            "layers": list(units.layers),
            "by_layer": {
                str(position): {
                    "attention_heads": list(kept.attention_heads),
                    "kv_heads": list(kept.kv_heads),
                    "ffn": list(kept.ffn),
                    "experts": list(kept.experts),
                    "expert_ffn": [list(channels) for channels in kept.expert_ffn],
                }
                for position, (_, kept) in enumerate(units.kept_layers())
            },
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside the target, which takes its name when everything is in it, and goes otherwise."""
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if os.path.lexists(target):
            raise PlanError(f"{target} was made by somebody else meanwhile: give the path of a new folder.")
        temporary.rename(target)
    except OSError as error:
        hint = "Free the disk or choose another path" if error.errno == errno.ENOSPC else "Choose another path"
        raise PlanError(f"can't write {target}: {error.strerror or error}. Nothing was left behind. {hint}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
