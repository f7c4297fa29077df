"""An evaluation: parent and smaller models on held-out text, in the layout of the job."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from megascore.config import JobConfig
from megascore.errors import ConfigError, DataError, PlanError
from megascore.evaluation.result import Evaluation, ModelResult, render_evaluation
from megascore.evaluation.statistics import ratio
from megascore.files.json_text import parse_json
from megascore.files.output_path import check_output_path
from megascore.job.inputs import JobInputs, check_inputs, load_chunks, read_inputs
from megascore.job.job import quiet_megatron
from megascore.job.pair_runs import Candidate, pair_sums
from megascore.job.resolved import ModelForm
from megascore.mcore.models.choose import model_source
from megascore.mcore.models.source import ModelSource
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.plans.choose import choose_units, spread_over_layers
from megascore.plans.model_size import model_size
from megascore.plans.orders import Orders, RandomOrders
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan
from megascore.plans.plan_file import plan_of_document, read_plan
from megascore.plans.units import Units
from megascore.plans.weight_norms import WeightNormOrders
from megascore.pruning.prune import RECORD
from megascore.versions import installed_versions

__all__ = ["EvaluationRequest", "run_evaluation"]

logger = logging.getLogger(__name__)

BASELINES = ("random", "weight_norm")


@dataclass(frozen=True)
class EvaluationRequest:
    """What is compared with the model of a job's config."""

    plan: str | None = None
    """File of a plan, which is evaluated by masks in the parent."""
    smaller: str | None = None
    """Hugging Face folder of a smaller model."""
    baselines: tuple[str, ...] = BASELINES
    """What the same plan is beside: units taken at random, and by the norm of their weights."""
    output: str | None = None
    """File for the result, as JSON."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: nothing to evaluate, or an unknown baseline.
        """
        if self.plan is None and self.smaller is None:
            raise ConfigError("nothing is to be evaluated: give plan=PLAN.yaml, smaller=FOLDER, or both.")
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"baselines has '{name}': expected some of {', '.join(BASELINES)}.")


@dataclass(frozen=True)
class _Wanted:
    """What rank 0 has found out about the models, for every rank."""

    parent_size: Mapping[str, int]
    masks: Mapping[str, Units]
    sizes: Mapping[str, Mapping[str, int]]


def run_evaluation(config: JobConfig, request: EvaluationRequest, console: Console) -> Evaluation:
    """Evaluate, show the result on rank 0, and write it where that is asked for.

    Collective over the world that torchrun started, in the layout of the config. Samples are those of the config's
    data; a step's samples are split over data-parallel ranks as in a scoring job.

    Args:
        config: The parent (``model.hf``), data, layout and run; its scores and ``run.output`` have no part in this.
        request: What is compared with it.
        console: Where rank 0 shows progress and result.

    Raises:
        MegascoreError: a wrong config, plan, model, text or layout, before anything long starts; documents of one token
            each, in which nothing is predicted.
    """
    form = ModelForm.of(config, local_device(config.run.device))
    timeout = timedelta(minutes=config.run.timeout_minutes)
    with quiet_megatron(), parallel_world(config.parallel, form.device, timeout):
        source, smaller = agree("checking the job", lambda: _check(config, request))
        wanted = broadcast_object(agree("reading the plan", lambda: _wanted(config, request)))
        assert wanted is not None, "rank 0 has read it"
        inputs = read_inputs(config, source, form)
        chunks = agree("loading the model", lambda: load_chunks(inputs))
        candidates = [Candidate(name, units) for name, units in wanted.masks.items()]
        if smaller is not None:
            own = replace(inputs, source=smaller)
            loaded = agree("loading the smaller model", lambda: load_chunks(own))
            candidates.insert(0, Candidate(_name_of_smaller(request), None, loaded))
        sums = pair_sums(inputs, chunks, candidates, console)
        evaluation = agree("adding up", lambda: _evaluation(config, request, inputs, wanted, sums))
        agree("writing the result", lambda: _write(config, request, evaluation))
        if world_rank() == 0:
            console.print(render_evaluation(evaluation))
    return evaluation


def _check(config: JobConfig, request: EvaluationRequest) -> tuple[ModelSource, ModelSource | None]:
    if config.model.hf is None:
        raise ConfigError("an evaluation needs model.hf: plans are for Hugging Face folders.")
    source = check_inputs(config)
    smaller = None
    if request.smaller is not None:
        smaller = model_source(replace(config.model, hf=request.smaller, load=None, provider=None))
        smaller.builder.check(config.parallel)
        smaller.weights.check()
    if world_rank() == 0 and request.output is not None:
        check_output_path(request.output, config.run.overwrite)
    return source, smaller


def _wanted(config: JobConfig, request: EvaluationRequest) -> _Wanted | None:
    """Read the plan, and draw the baselines; on rank 0."""
    if world_rank() != 0:
        return None
    parent = Parent.of(str(config.model.hf))
    plan = read_plan(request.plan, parent) if request.plan is not None else _plan_behind(str(request.smaller), parent)
    masks: dict[str, Units] = {}
    sizes: dict[str, Mapping[str, int]] = {}
    if request.plan is not None and plan is not None:
        masks[Path(request.plan).name] = plan.units
    if plan is not None:
        orders: dict[str, Orders] = {"random": RandomOrders(config.run.seed), "weight_norm": WeightNormOrders(parent)}
        for name in request.baselines:
            masks[name.replace("_", " ")] = units_like(plan, parent, orders[name])
    for name, units in masks.items():
        sizes[name] = model_size(parent.config, units, parent.bytes_per_value).as_json()
    if request.smaller is not None:
        sizes[_name_of_smaller(request)] = Parent.of(request.smaller).size.as_json()
    return _Wanted(parent.size.as_json(), masks, sizes)


def _name_of_smaller(request: EvaluationRequest) -> str:
    name = Path(str(request.smaller)).resolve().name
    taken = {name.replace("_", " ") for name in BASELINES} | {Path(str(request.plan)).name}
    return f"{name} (folder)" if name in taken else name


def units_like(plan: Plan, parent: Parent, orders: Orders) -> Units:
    """Return units of the sizes of a plan, chosen by other orders."""
    units = choose_units(parent.config, plan.sizes_after, orders)
    step = plan.rules.multiple_of["ffn"]
    return spread_over_layers(parent.config, units, orders, step) if plan.rules.per_layer else units


def _plan_behind(folder: str, parent: Parent) -> Plan | None:
    """Return the plan that a folder was made of; None where it was made otherwise."""
    record = Path(folder) / RECORD
    if not record.is_file():
        logger.warning("%s has no %s, so there is no plan to draw random units for: no baselines.", folder, RECORD)
        return None
    try:
        document = parse_json(record.read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{record} can't be read ({error!r}): take it away to evaluate without baselines.") from error
    return plan_of_document(str(record), document, parent)


def _evaluation(
    config: JobConfig, request: EvaluationRequest, inputs: JobInputs, wanted: _Wanted, sums: Mapping[str, Tensor]
) -> Evaluation:
    first = next(iter(sums.values()))
    tokens, nats = first[:, 0], first[:, 1]
    if not bool((tokens > 0).any()):
        raise DataError("no token is predicted: every document has a single one. Give longer documents.")
    facts: dict[str, Any] = {
        "data": inputs.metadata["data"],
        "data_fingerprint": inputs.metadata["data_fingerprint"],
        "weights_fingerprint": inputs.metadata["weights_fingerprint"],
        "layout": asdict(config.parallel),
        "dtype": config.model.dtype,
        "plan": request.plan,
        "smaller": request.smaller,
        "versions": installed_versions(),
    }
    return Evaluation(
        inputs.source.name,
        ratio(nats, tokens),
        wanted.parent_size,
        int((tokens > 0).sum()),
        int(tokens.sum()),
        [ModelResult.of(name, found, wanted.sizes.get(name, {})) for name, found in sums.items()],
        facts,
        _advice(config, request),
    )


def _advice(config: JobConfig, request: EvaluationRequest) -> str:
    if request.smaller is None:
        return ""
    folders: Sequence[str] = (str(config.model.hf), request.smaller)
    commands = "\n".join(
        f"  lm_eval --model hf --model_args pretrained={folder},dtype={config.model.dtype} --tasks gsm8k,mmlu"
        for folder in folders
    )
    return f"Loss hides what generation loses; with lm-eval (pip install lm-eval):\n{commands}"


def _write(config: JobConfig, request: EvaluationRequest, evaluation: Evaluation) -> None:
    if world_rank() == 0 and request.output is not None:
        evaluation.save(request.output, config.run.overwrite)
