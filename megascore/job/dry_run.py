"""The dry run of a job: every rank's part of the model is built, and nothing is read, loaded or written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from megascore.config import JobConfig
from megascore.data import check_enough_samples, check_equal_shares
from megascore.errors import ModelError
from megascore.job.inputs import check_model, problems
from megascore.job.layer_weights import build_for_blocks, whole_because
from megascore.job.planned import (
    DryRun,
    RankGroup,
    RankPlan,
    group_ranks,
    plan_of_one_layer,
    plan_of_rank,
    samples_of_rank,
    samples_of_step,
)
from megascore.job.resolved import ModelForm
from megascore.mcore.models.empty_layers import filled
from megascore.mcore.models.layout import exchanges_tokens
from megascore.mcore.models.source import ModelSource
from megascore.mcore.pipeline.layers import layer_numbers, layers_in_order, order_of_layers
from megascore.mcore.sites.view import MegatronModelView
from megascore.mcore.world.parallel_world import (
    check_world_size,
    intended_world_size,
    is_alone,
    local_device,
    parallel_world,
)
from megascore.mcore.world.pretend import META, kinds_of_ranks, pretended_world
from megascore.parallel.comm import agree, gather_objects, world_rank
from megascore.sites.requests import ScoreRequest, resolve_scores
from megascore.sites.site import check_places

__all__ = ["dry_run"]


def dry_run(config: JobConfig) -> DryRun | None:
    """Find out what a job would measure, keep and send, without weights and data.

    Collective over the world that torchrun started. A process by itself pretends the world that the job is meant for,
    whatever ``run.device`` says: it builds one rank after the other on the meta device, each kind of rank once.

    Returns:
        The plan of all ranks; None on other ranks than 0.

    Raises:
        MegascoreError: a wrong config, model or layout. What is wrong with weights, data and output is only told.
    """
    return _pretend(config) if is_alone() else _plan_together(config)


def _plan_together(config: JobConfig) -> DryRun | None:
    device = local_device(config.run.device)
    with parallel_world(config.parallel, device, timedelta(minutes=config.run.timeout_minutes)):
        source = agree("checking the job", lambda: check_model(config))
        planner = _RankPlanner.of(config, source, device)
        view = agree("building the model", planner.build)
        agree("looking for the modules to score", lambda: planner.check(view))
        if planner.by_layer:
            order_of_layers(view.modules)
        groups = group_ranks(gather_objects(agree("building the hooks", lambda: planner.plan(view))))
        texts = [str(error) for error in problems(config, source)] if world_rank() == 0 else []
        planned = DryRun(groups, view.layout, samples_of_step(view, planner.global_batch_size), False, texts)
        # All ranks have the same plans, so they find the same.
        planned.check(planner.requests)
        return planned if world_rank() == 0 else None


def _pretend(config: JobConfig) -> DryRun:
    source, parallel = check_model(config), config.parallel
    world_size = intended_world_size(parallel)
    check_world_size(parallel, world_size)
    planner = _RankPlanner.of(config, source, META)
    groups, layers, layout, num_samples = [], [], {}, 0
    for ranks in kinds_of_ranks(parallel, world_size):
        with pretended_world(parallel, ranks[0], world_size):
            view = _build_without_memory(planner, world_size)
            planner.check(view)
            layout, num_samples = dict(view.layout), samples_of_step(view, planner.global_batch_size)
            if planner.by_layer:
                layers.append(layer_numbers(view.modules))
            groups.append(RankGroup(ranks, planner.plan(view)))
    if planner.by_layer:
        layers_in_order(layers)
    texts = [str(error) for error in problems(config, source)]
    planned = DryRun(tuple(groups), layout, num_samples, True, texts)
    planned.check(planner.requests)
    return planned


def _build_without_memory(planner: _RankPlanner, world_size: int) -> MegatronModelView:
    try:
        return planner.build()
    except RuntimeError as error:
        # What PyTorch raises where a value is asked of a tensor that has none.
        raise ModelError(
            f"{planner.source.name} cannot be built on PyTorch's meta device, where tensors have no values, as a dry "
            f"run in one process does: {error} Start the dry run in its own world: torchrun --nproc-per-node "
            f"{world_size} -m megascore score CONFIG run.steps=0."
        ) from error


@dataclass(frozen=True)
class _RankPlanner:
    """Plans what a rank does; the same in a real world and in a pretended one."""

    source: ModelSource
    form: ModelForm
    requests: tuple[ScoreRequest, ...]
    num_samples: int | None
    """That are asked for; None takes all that the data has."""
    global_batch_size: int
    by_layer: bool
    """Whether layers run one at a time."""
    spools: bool

    @classmethod
    def of(cls, config: JobConfig, source: ModelSource, device: torch.device) -> _RankPlanner:
        form, run = ModelForm.of(config, device), config.run
        samples = (config.data.num_samples, run.global_batch_size)
        return cls(source, form, resolve_scores(config.scores), *samples, run.blockwise, run.spool_dir is not None)

    def build(self) -> MegatronModelView:
        """Build this rank's part of the model. Collective as building is."""
        if self.by_layer:
            return MegatronModelView(build_for_blocks(self.source, self.form))
        return MegatronModelView(self.form.build(self.source))

    def check(self, view: MegatronModelView) -> None:
        """Check what can be known without data: places, and whether the samples asked for are shared out evenly."""
        check_places(view, self.requests)
        data_size = int(view.layout["data"])
        if self.num_samples is not None:
            check_enough_samples(self.num_samples, data_size)
            if exchanges_tokens(self.form.parallel):
                check_equal_shares(self.num_samples, self.global_batch_size, data_size)

    def plan(self, view: MegatronModelView) -> RankPlan:
        """Return the plan of this rank. Collective where building hooks is (see `build_sites`)."""
        of_step = samples_of_step(view, self.global_batch_size)
        if not self.by_layer:
            return plan_of_rank(view, self.requests, of_step)
        # Layers have weights, of no value, only while a hook is made for them.
        plan = plan_of_rank(view, self.requests, of_step, lambda module: filled(module, self.form.device))
        num_samples, data_size = self.num_samples, int(view.layout["data"])
        if num_samples is not None:
            num_samples = samples_of_rank(num_samples, self.global_batch_size, data_size)
        reason = whole_because(self.source, view.modules)
        return replace(plan, one_layer=plan_of_one_layer(view, self.form, num_samples, reason, spools=self.spools))
