"""The dry run of a job: every rank's part of the model is built, and nothing is read, loaded or written."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import torch

from megascore.config import JobConfig
from megascore.data import check_enough_samples, check_equal_shares
from megascore.errors import ModelError
from megascore.job.dry_run_of_layers import memory_of_one_layer
from megascore.job.inputs import check_files, check_model
from megascore.job.layer_weights import build_for_blocks
from megascore.job.planned import DryRun, RankGroup, RankPlan, group_ranks, plan_of_rank, samples_of_step
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
    requests = resolve_scores(config.scores)
    return _pretend(config, requests) if is_alone() else _plan_together(config, requests)


def _plan_together(config: JobConfig, requests: tuple[ScoreRequest, ...]) -> DryRun | None:
    device = local_device(config.run.device)
    with parallel_world(config.parallel, device, timedelta(minutes=config.run.timeout_minutes)):
        source = agree("checking the job", lambda: check_model(config))
        view = agree("building the model", lambda: _build(config, source, device))
        agree("looking for the modules to score", lambda: _check_rank(config, view, requests))
        num_samples = samples_of_step(view, config.run.global_batch_size)
        if config.run.blockwise:
            order_of_layers(view.modules)
        own = agree("building the hooks", lambda: _plan(config, source, view, requests, device))
        problems = check_files(config, source) if world_rank() == 0 else []
        planned = DryRun(group_ranks(gather_objects(own)), view.layout, num_samples, False, problems)
        # All ranks have the same plans, so they find the same.
        planned.check(requests)
        return planned if world_rank() == 0 else None


def _pretend(config: JobConfig, requests: tuple[ScoreRequest, ...]) -> DryRun:
    source = check_model(config)
    world_size = intended_world_size(config.parallel)
    check_world_size(config.parallel, world_size)
    groups, layers, layout, num_samples = [], [], {}, 0
    for ranks in kinds_of_ranks(config.parallel, world_size):
        with pretended_world(config.parallel, ranks[0], world_size):
            view = _build_without_memory(config, source)
            _check_rank(config, view, requests)
            layout, num_samples = dict(view.layout), samples_of_step(view, config.run.global_batch_size)
            if config.run.blockwise:
                layers.append(layer_numbers(view.modules))
            groups.append(RankGroup(ranks, _plan(config, source, view, requests, META)))
    if config.run.blockwise:
        layers_in_order(layers)
    planned = DryRun(tuple(groups), layout, num_samples, True, check_files(config, source))
    planned.check(requests)
    return planned


def _build_without_memory(config: JobConfig, source: ModelSource) -> MegatronModelView:
    try:
        return _build(config, source, META)
    except RuntimeError as error:
        # What PyTorch raises where a value is asked of a tensor that has none.
        raise ModelError(
            f"{source.name} cannot be built on PyTorch's meta device, where tensors have no values, as a dry run in "
            f"one process does: {error} Start the dry run in its own world: torchrun --nproc-per-node "
            f"{intended_world_size(config.parallel)} -m megascore score CONFIG run.steps=0."
        ) from error


def _build(config: JobConfig, source: ModelSource, device: torch.device) -> MegatronModelView:
    if config.run.blockwise:
        return MegatronModelView(build_for_blocks(config, source, device))
    dtype = getattr(torch, config.model.dtype)
    return MegatronModelView(source.build(config.parallel, dtype, device, config.data.sequence_length))


def _plan(
    config: JobConfig,
    source: ModelSource,
    view: MegatronModelView,
    requests: tuple[ScoreRequest, ...],
    device: torch.device,
) -> RankPlan:
    """Collective where building hooks is."""
    num_samples = samples_of_step(view, config.run.global_batch_size)
    if not config.run.blockwise:
        return plan_of_rank(view, requests, num_samples)
    # Layers have weights, of no value, only while a hook is made for them.
    plan = plan_of_rank(view, requests, num_samples, lambda module: filled(module, device))
    return replace(plan, one_layer=memory_of_one_layer(config, source, view))


def _check_rank(config: JobConfig, view: MegatronModelView, requests: tuple[ScoreRequest, ...]) -> None:
    """Check what can be known without data: places, and whether the samples asked for are shared out evenly."""
    check_places(view, requests)
    wanted, data_size = config.data.num_samples, int(view.layout["data"])
    if wanted is not None:
        check_enough_samples(wanted, data_size)
        if exchanges_tokens(config.parallel):
            check_equal_shares(wanted, config.run.global_batch_size, data_size)
