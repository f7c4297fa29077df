"""A whole scoring job: check everything, build the model in its layout, run the data through it, write the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megascore.config import JobConfig
from megascore.files.whole import write_whole
from megascore.job.dry_run import dry_run
from megascore.job.dry_run_report import render_dry_run
from megascore.job.inputs import JobInputs, check_job, check_output, finished_scores, read_inputs
from megascore.job.layer_by_layer import run_blockwise
from megascore.job.steps import progress_facts, run_steps
from megascore.mcore.compat import without_deprecation_log
from megascore.mcore.models.source import ModelSource
from megascore.mcore.sites.view import MegatronModelView
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.parallel.comm import agree, world_rank
from megascore.process.signals import Signals
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.plan import CheckpointPlan
from megascore.runs.scoring_run import ScoringRun
from megascore.scores.report import render_scores
from megascore.scores.score_file import Scores
from megascore.sites.requests import check_num_steps, resolve_scores

__all__ = ["run_job"]


def run_job(config: JobConfig, console: Console, *, write: Callable[..., None] = write_whole) -> Scores | None:
    """Run a scoring job and write its score file.

    Collective over the world that torchrun started; a world of one without torchrun, where a dry run pretends others.
    With ``run.checkpoint_dir`` the job saves as it goes; started again, it goes on from there, on any layout, or says
    that it is finished.

    Args:
        config: What to do.
        console: Where rank 0 shows progress and result.
        write: Writes a file of ``run.checkpoint_dir``, with the arguments of `write_whole`.

    Returns:
        The scores, the same on every rank; None for a dry run (``run.steps=0``).

    Raises:
        MegascoreError: a wrong config, model, text, layout or output path, before anything long starts. The rank that
            found it raises what it found, the others `RankFailure`.
        Preempted: a signal asked for it, and everything is saved.
    """
    if config.run.steps == 0:
        with _quiet_megatron():
            planned = dry_run(config)
        if planned is not None:
            render_dry_run(planned, console)
        return None
    timeout = timedelta(minutes=config.run.timeout_minutes)
    device = local_device(config.run.device)
    folder = config.run.checkpoint_dir
    signals = Signals()
    # Signals are noted from the beginning: joining the others and reading the data take a while.
    with (
        _quiet_megatron(),
        nullcontext() if folder is None else signals,
        parallel_world(config.parallel, device, timeout),
    ):
        source = agree("checking the job", lambda: check_job(config))
        if folder is None:
            return _run(config, source, device, console, None)
        with Checkpointer(_checkpoint_plan(config, folder), console, signals, write=write) as checkpoints:
            return _run(config, source, device, console, checkpoints)


def _run(
    config: JobConfig, source: ModelSource, device: torch.device, console: Console, checkpoints: Checkpointer | None
) -> Scores | None:
    requests = resolve_scores(config.scores)
    inputs = read_inputs(config, source, requests)
    snapshot = None
    if checkpoints is not None:
        finished = finished_scores(config, inputs.identity)
        if finished is not None:
            if world_rank() == 0:
                console.print(f"{config.run.output} holds the finished scores of this run: nothing to do.")
            checkpoints.finish()
            return finished
        agree("checking the output", lambda: check_output(config))
        snapshot = checkpoints.find(inputs.identity)
        if snapshot is None:
            # From here on a watcher sees the run. One that goes on says so when its checkpoint has been found to fit.
            checkpoints.begin(inputs.total_steps, None, progress_facts(config))
        checkpoints.stop_if_asked()
    if config.run.blockwise:
        scores = run_blockwise(config, inputs, requests, device, console, checkpoints, snapshot)
        return _write(config, scores, console, checkpoints)
    chunks = agree("loading the model", lambda: _load_model(config, inputs, device))
    agree("checking the scores", lambda: check_num_steps(requests, inputs.total_steps))
    with ScoringRun(MegatronModelView(chunks), requests, inputs.metadata(config)) as run:
        if snapshot is not None:
            run.restore(snapshot.states, snapshot.step)
        if checkpoints is not None:
            checkpoints.stop_if_asked()
            checkpoints.begin(inputs.total_steps, snapshot, progress_facts(config))
        loss = run_steps(config, run, chunks, inputs.samples, inputs.total_steps, console, checkpoints, snapshot)
    return _write(config, run.finish({"loss": loss}), console, checkpoints)


def _write(config: JobConfig, scores: Scores, console: Console, checkpoints: Checkpointer | None) -> Scores:
    agree("writing the score file", lambda: scores.save(config.run.output, overwrite=config.run.overwrite))
    if checkpoints is not None:
        checkpoints.finish()
    if world_rank() == 0:
        console.print(render_scores(scores))
        console.print(f"Scores written to {config.run.output}")
    return scores


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Leave out what Megatron warns of on every rank and no user of a job can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning)
        # The router's type is the model's own.
        warnings.filterwarnings("ignore", message="Using a large number of experts", category=UserWarning)
        with without_deprecation_log():
            yield


def _load_model(config: JobConfig, inputs: JobInputs, device: torch.device) -> list[Any]:
    dtype = getattr(torch, config.model.dtype)
    chunks = inputs.source.build(config.parallel, dtype, device, config.data.sequence_length)
    inputs.source.check_tokens(chunks, inputs.samples.largest_token)
    inputs.source.load(chunks)
    return chunks


def _checkpoint_plan(config: JobConfig, folder: str) -> CheckpointPlan:
    return CheckpointPlan(
        Path(folder),
        interval=config.run.checkpoint_interval,
        seconds=config.run.checkpoint_seconds,
        afresh=config.run.resume == "never",
        # Before the other ranks stop waiting, so that all end with the error of the storage.
        storage_seconds=config.run.timeout_minutes * 60 / 4,
    )
