"""A search: plans that meet a budget, evaluated by masks in one start of the model; goes on after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from megascore.config import JobConfig
from megascore.errors import ConfigError, PlanError
from megascore.evaluation.result import ModelResult, with_error
from megascore.evaluation.statistics import ratio
from megascore.files.json_text import parse_json
from megascore.files.whole import write_whole
from megascore.job.inputs import JobInputs, check_inputs, load_chunks, read_inputs
from megascore.job.job import quiet_megatron
from megascore.job.pair_runs import Candidate, pair_sums
from megascore.job.resolved import ModelForm
from megascore.mcore.models.source import ModelSource
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.plans.grid import candidate_plans
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan
from megascore.scores.report import new_table, titled
from megascore.scores.score_file import load_scores

__all__ = ["SearchRequest", "run_search"]

AT_ONCE = 8
"""Candidates for each pass of the parent; what a kill loses at most."""
STATE, BEST = "search.json", "best.yaml"
VERSION = 1


@dataclass(frozen=True)
class SearchRequest:
    """What is searched for."""

    scores: str
    """Score file."""
    wanted: Mapping[str, str]
    """Budget, grid and rules, see `candidate_plans`."""
    folder: str
    """Where the table and the best plan go; a search that was stopped goes on there."""


@dataclass
class _State:
    """What is known so far; rank 0 keeps it in a file."""

    identity: dict[str, Any]
    parent_loss: float | None
    results: dict[str, ModelResult]

    def save(self, folder: Path) -> None:
        content = {
            "megascore_search": VERSION,
            "identity": self.identity,
            "parent_loss": self.parent_loss,
            "results": [result.as_json() for result in by_loss(self.results.values())],
        }
        write_whole(folder / STATE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def run_search(config: JobConfig, request: SearchRequest, console: Console) -> dict[str, ModelResult]:
    """Evaluate all plans of a grid that meet a budget, show them, and write the best one.

    Collective over the world that torchrun started. After each `AT_ONCE` plans the results are saved; the same command
    goes on from there, on any layout.

    Args:
        config: The parent, data, layout and run.
        request: What is searched for.
        console: Where rank 0 shows progress and result.

    Returns:
        The results by the plans' names, the same on every rank.

    Raises:
        MegascoreError: a wrong config, grid, score file or layout, or a folder with another search.
    """
    form = ModelForm.of(config, local_device(config.run.device))
    with quiet_megatron(), parallel_world(config.parallel, form.device, timedelta(minutes=config.run.timeout_minutes)):
        source = agree("checking the job", lambda: _check(config))
        plans = broadcast_object(agree("planning", lambda: _plans(config, request)))
        assert plans is not None, "rank 0 has made them"
        inputs = read_inputs(config, source, form)
        state = broadcast_object(agree("looking for a search to go on with", lambda: _state(request, inputs, plans)))
        assert state is not None, "rank 0 has looked"
        _evaluate_missing(inputs, request, plans, state, console)
        if world_rank() == 0:
            best = by_loss(state.results.values())[0]
            console.print(render_search(state.parent_loss, state.results.values()))
            console.print(
                f"The best plan, {best.name}, is in {Path(request.folder) / BEST}", highlight=False, soft_wrap=True
            )
    return state.results


def by_loss(results: Any) -> list[ModelResult]:
    """Return results, the smallest loss first, and those without a finite one last."""
    return sorted(results, key=lambda result: (not math.isfinite(result.loss), result.loss, result.name))


def render_search(parent_loss: float | None, results: Any) -> RenderableType:
    """Return a table of the results, the best first."""
    table = new_table()
    table.add_column("plan")
    for name in ("params", "active", "KV bytes", "loss", "rise", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in by_loss(results):
        table.add_row(
            result.name,
            f"{result.size['parameters'] / 1e6:,.1f} M",
            f"{result.size['active_parameters'] / 1e6:,.1f} M",
            f"{result.size['kv_cache_bytes_per_token']:,}",
            f"{result.loss:.4f}",
            with_error(result.loss_rise, 4),
            with_error(result.kl, 4),
        )
    parent = "" if parent_loss is None else f"; the parent has {parent_loss:.4f}"
    return titled(f"Loss by masks in the parent, in nats per token{parent}", table)


def _check(config: JobConfig) -> ModelSource:
    if config.model.hf is None:
        raise ConfigError("a search needs model.hf: plans are for Hugging Face folders.")
    return check_inputs(config)


def _plans(config: JobConfig, request: SearchRequest) -> dict[str, Plan] | None:
    if world_rank() != 0:
        return None
    scores, parent = load_scores(request.scores), Parent.of(str(config.model.hf))
    parent.check_scores(scores, request.wanted.get("same_weights") == "true")
    return candidate_plans(scores, request.scores, parent, request.wanted)


def _state(request: SearchRequest, inputs: JobInputs, plans: Mapping[str, Plan]) -> _State | None:
    """Return what an earlier start has found, on rank 0."""
    if world_rank() != 0:
        return None
    first = next(iter(plans.values()))
    identity = {
        "scores": first.scores.sha256,
        "weights": first.weights_fingerprint,
        "data": inputs.metadata["data_fingerprint"],
        "num_samples": inputs.samples.num_samples,
        "steps": inputs.total_steps,
        "dtype": inputs.metadata["model"]["dtype"],
        "wanted": dict(request.wanted),
    }
    folder = Path(request.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = (folder / STATE).read_text(encoding="utf-8") if (folder / STATE).is_file() else None
    except OSError as error:
        raise ConfigError(f"{folder} can't be used: {error.strerror or error}. Choose another folder.") from error
    if text is None:
        return _State(identity, None, {})
    try:
        content = parse_json(text)
        found, loss = content["identity"], content["parent_loss"]
        results = {entry["name"]: ModelResult.of_json(entry) for entry in content["results"]}
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{folder / STATE} is no search ({error!r}): take it away or choose another folder.") from error
    other = [name for name, value in identity.items() if found.get(name) != value]
    if other:
        raise PlanError(
            f"{folder} holds a search with other {', '.join(other)}: choose another folder, or take {STATE} away."
        )
    return _State(identity, loss, results)


def _evaluate_missing(
    inputs: JobInputs, request: SearchRequest, plans: Mapping[str, Plan], state: _State, console: Console
) -> None:
    missing: Sequence[str] = [name for name in plans if name not in state.results]
    if not missing:
        # The kill may have come between the two files.
        agree("saving the search", lambda: _save(request, plans, state))
        return
    chunks = agree("loading the model", lambda: load_chunks(inputs))
    for start in range(0, len(missing), AT_ONCE):
        names = missing[start : start + AT_ONCE]
        if world_rank() == 0:
            console.print(f"plans {start + 1} to {start + len(names)} of {len(missing)}", highlight=False)
        sums = pair_sums(inputs, chunks, [Candidate(name, plans[name].units) for name in names], console)
        for name, found in sums.items():
            state.results[name] = ModelResult.of(name, found, plans[name].after.as_json())
            state.parent_loss = ratio(found[:, 1], found[:, 0]).mean
        agree("saving the search", lambda: _save(request, plans, state))


def _save(request: SearchRequest, plans: Mapping[str, Plan], state: _State) -> None:
    if world_rank() != 0:
        return
    folder = Path(request.folder)
    try:
        state.save(folder)
    except OSError as error:
        raise ConfigError(f"{folder / STATE} can't be written: {error.strerror or error}.") from error
    plans[by_loss(state.results.values())[0].name].save(folder / BEST, overwrite=True)
