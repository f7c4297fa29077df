"""A smaller model whose output projections are fitted again on calibration data, in the layout of the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console

from megascore.capture.stores import HostStore
from megascore.compensation.projections import projections_of, tensor_names
from megascore.compensation.refit import RIDGE
from megascore.compensation.work_folder import WorkFolder
from megascore.config import JobConfig
from megascore.errors import ConfigError, PlanError
from megascore.job.compensation_layers import LayerRefits, Method
from megascore.job.inputs import JobInputs, check_inputs, read_inputs
from megascore.job.job import quiet_megatron
from megascore.job.layer_weights import load_for_blocks
from megascore.job.resolved import ModelForm
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import order_of_layers
from megascore.mcore.sites.view import MegatronModelView
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.plans.parent import Parent
from megascore.plans.plan import Plan
from megascore.plans.plan_file import read_plan
from megascore.pruning.prune import check_output, prune
from megascore.runs.progress import ScoringProgress

__all__ = ["METHODS", "CompensationRequest", "run_compensation"]

METHODS = ("least_squares", "bias")


@dataclass(frozen=True)
class CompensationRequest:
    """What is made of the model of a job's config."""

    plan: str
    """File of the plan."""
    output: str
    """Folder to write; none is there."""
    method: str = METHODS[0]
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: an unknown method, or a ridge below 0.
        """
        if self.method not in METHODS:
            raise ConfigError(f"--compensate is '{self.method}': expected one of {', '.join(METHODS)}.")
        if not 0 <= self.ridge < float("inf"):
            raise ConfigError(f"the ridge is {self.ridge}: expected 0 or more.")


def run_compensation(config: JobConfig, request: CompensationRequest, console: Console) -> None:
    """Make the smaller model of a plan, its output projections fitted again, in the layout of the config.

    Collective over the world that torchrun started. A layer's weights are on the device while it runs; new weights wait
    in a folder beside the output, with which the same command goes on after a kill, on any layout.

    Args:
        config: The parent (``model.hf``), calibration data, layout and run; scores and ``run.output`` have no part.
        request: The plan, the folder and the method.
        console: Where rank 0 shows progress.

    Raises:
        MegascoreError: a wrong config, plan, model, text or layout, before anything long starts.
    """
    form = ModelForm.of(config, local_device(config.run.device))
    timeout = timedelta(minutes=config.run.timeout_minutes)
    folder = WorkFolder(request.output)
    with quiet_megatron(), parallel_world(config.parallel, form.device, timeout):
        source, plan, parent = agree("checking the job", lambda: _check(config, request))
        inputs = read_inputs(config, source, form)
        identity = _identity(request, plan, inputs)
        done = broadcast_object(agree("looking for layers that are done", lambda: _begin(folder, identity)))
        assert done is not None, "rank 0 has looked"
        _fit(inputs, request, plan, parent, folder, identity, done, console)
        agree("writing the model", lambda: _write(config, request, plan, folder, identity))
        if world_rank() == 0:
            console.print(f"Model written to {request.output}", soft_wrap=True, highlight=False, markup=False)


def _check(config: JobConfig, request: CompensationRequest) -> tuple[ModelSource, Plan, Parent]:
    if config.model.hf is None:
        raise ConfigError("--compensate needs model.hf: plans are for Hugging Face folders.")
    source = check_inputs(config)
    parent = Parent.of(config.model.hf)
    plan = read_plan(request.plan, parent)
    if world_rank() == 0:
        check_output(request.output)
    if request.method == "bias":
        _require_biases(plan, parent)
    return source, plan, parent


def _require_biases(plan: Plan, parent: Parent) -> None:
    """Refuse a mean of what left where the architecture has no bias for it.

    Raises:
        PlanError: naming the projections.
    """
    stored = parent.checkpoint.folder.tensors
    wanted = [name for name in tensor_names(parent).values() if _goes(name, plan)]
    missing = [name for name in wanted if name.removesuffix(".weight") + ".bias" not in stored]
    if missing:
        raise PlanError(
            f"--compensate=bias: a {plan.model_type} has no bias for {missing[0]} (and {len(missing) - 1} more): "
            "take --compensate=least_squares."
        )


def _goes(name: str, plan: Plan) -> bool:
    """Tell whether a plan takes inputs from a projection of this kind, by the name of its tensor."""
    sizes = {"o_proj": "attention_heads", "down_proj": "expert_ffn" if "experts" in name else "ffn"}
    target = next((target for part, target in sizes.items() if part in name), None)
    before, after = plan.sizes_before, plan.sizes_after
    return target is not None and target in before and after[target] < before[target]


def _identity(request: CompensationRequest, plan: Plan, inputs: JobInputs) -> dict[str, Any]:
    from megascore.plans.plan_file import as_document

    document = as_document(plan)
    return {
        "plan": {name: document[name] for name in ("sizes", "kept")},
        "weights_fingerprint": plan.weights_fingerprint,
        "data_fingerprint": inputs.metadata["data_fingerprint"],
        "num_samples": inputs.samples.num_samples,
        "num_steps": inputs.total_steps,
        "sequence_length": inputs.form.sequence_length,
        "dtype": str(inputs.form.dtype),
        "method": request.method,
        "ridge": request.ridge,
    }


def _begin(folder: WorkFolder, identity: Mapping[str, Any]) -> int | None:
    # As JSON gives it back.
    return folder.begin(_as_json(identity)) if world_rank() == 0 else None


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def _fit(
    inputs: JobInputs,
    request: CompensationRequest,
    plan: Plan,
    parent: Parent,
    folder: WorkFolder,
    identity: Mapping[str, Any],
    done: int,
    console: Console,
) -> None:
    chunks = agree(
        "loading the model", lambda: load_for_blocks(inputs.source, inputs.form, inputs.samples.largest_token)
    )
    view, names = MegatronModelView(chunks), tensor_names(parent)
    order = order_of_layers(chunks)
    facts = folder.facts() if world_rank() == 0 else []

    def save(layer: int, of_layer: list[dict[str, Any]]) -> None:
        facts.extend(of_layer)
        folder.save_progress(_as_json(identity), layer + 1, facts)

    layers = LayerRefits(
        inputs,
        view,
        order,
        plan.units,
        Method(request.method, request.ridge),
        lambda places: projections_of(places, plan.units, parent, names),
        folder,
        HostStore,
    )
    tokens = inputs.samples.num_tokens(slice(None))
    progress = ScoringProgress(order.num_layers, tokens, enabled=world_rank() == 0, console=console, what="fitting")
    try:
        with progress:
            layers.run(done, save, progress)
    finally:
        layers.close()


def _write(
    config: JobConfig, request: CompensationRequest, plan: Plan, folder: WorkFolder, identity: Mapping[str, Any]
) -> None:
    if world_rank() != 0:
        return
    record = {
        "method": request.method,
        "ridge": request.ridge,
        "data_fingerprint": identity["data_fingerprint"],
        "num_samples": identity["num_samples"],
        "projections": folder.facts(),
    }
    prune(str(config.model.hf), plan, request.output, replaced=folder.read, record={"compensation": record})
    folder.remove()
