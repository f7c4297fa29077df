"""A whole scoring job: check everything, build the model in its layout, run the data through it, write the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console

from megascore.capture.stores import HostStore, SpoolStore, TensorStore
from megascore.config import JobConfig
from megascore.files.whole import write_whole
from megascore.job.dry_run import dry_run
from megascore.job.dry_run_report import render_dry_run
from megascore.job.full_pass import run_full_pass
from megascore.job.inputs import check_job, read_inputs
from megascore.job.layer_by_layer import run_layer_by_layer
from megascore.job.resolved import ModelForm, Output
from megascore.job.watch import Watch
from megascore.mcore.compat import without_deprecation_log
from megascore.mcore.models.source import ModelSource
from megascore.mcore.world.parallel_world import local_device, parallel_world
from megascore.parallel.comm import agree, world_rank
from megascore.process.signals import Signals
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.plan import CheckpointPlan
from megascore.runs.steps import OnStep
from megascore.scores.report import render_scores
from megascore.scores.score_file import Scores
from megascore.sites.requests import check_num_steps

__all__ = ["quiet_megatron", "run_job"]


def run_job(
    config: JobConfig,
    console: Console,
    *,
    on_step: OnStep | None = None,
    write: Callable[..., None] = write_whole,
) -> Scores | None:
    """Run a scoring job and write its score file.

    Collective over the world that torchrun started; a world of one without torchrun, where a dry run pretends others.
    With ``run.checkpoint_dir`` the job saves as it goes; started again, it goes on from there, on any layout, or says
    that it is finished.

    Args:
        config: What to do.
        console: Where rank 0 shows progress and result.
        on_step: Is called on every rank between two steps, before anything is saved; what it raises ends the job.
        write: Writes a file of ``run.checkpoint_dir``, with the arguments of `write_whole`.

    Returns:
        The scores, the same on every rank; None for a dry run (``run.steps=0``).

    Raises:
        MegascoreError: a wrong config, model, text, layout or output path, before anything long starts. The rank that
            found it raises what it found, the others `RankFailure`.
        Preempted: a signal asked for it, and everything is saved.
    """
    if config.run.steps == 0:
        with quiet_megatron():
            planned = dry_run(config)
        if planned is not None:
            render_dry_run(planned, console)
        return None
    timeout = timedelta(minutes=config.run.timeout_minutes)
    form = ModelForm.of(config, local_device(config.run.device))
    plan, signals = _checkpoint_plan(config), Signals()
    # Signals are noted from the beginning: joining the others and reading the data take a while.
    with (
        quiet_megatron(),
        nullcontext() if plan is None else signals,
        parallel_world(config.parallel, form.device, timeout, lambda: signals.stop),
    ):
        source = agree("checking the job", lambda: check_job(config))
        saving = nullcontext() if plan is None else Checkpointer(plan, console, signals, write=write)
        with saving as checkpoints:
            return _run(config, source, form, console, checkpoints, on_step)


def _run(
    config: JobConfig,
    source: ModelSource,
    form: ModelForm,
    console: Console,
    checkpoints: Checkpointer | None,
    on_step: OnStep | None,
) -> Scores:
    output, inputs = Output(config.run.output, config.run.overwrite), read_inputs(config, source, form)
    facts = {"output": output.path, "layout": asdict(config.parallel)}
    snapshot = None
    if checkpoints is not None:
        finished = None if config.run.resume == "never" else output.scores_of(inputs.identity)
        if finished is not None:
            if world_rank() == 0:
                console.print(f"{output.path} holds the finished scores of this run: nothing to do.")
            checkpoints.finish()
            return finished
        agree("checking the output", output.check)
        snapshot = checkpoints.find(inputs.identity)
        if snapshot is None:
            # From here on `megascore status` sees the run. One that goes on appears there when its checkpoint fits.
            checkpoints.begin(inputs.total_steps, None, facts)
        checkpoints.stop_if_asked()
    agree("checking the scores", lambda: check_num_steps(inputs.requests, inputs.total_steps))
    watch = Watch(console, checkpoints, snapshot, facts, on_step)
    if config.run.blockwise:
        make_store = partial(_make_store, config.run.spool_dir, config.run.spool_memory_gb)
        scores = run_layer_by_layer(inputs, watch, make_store)
    else:
        scores = run_full_pass(inputs, watch)
    output.write(scores)
    if checkpoints is not None:
        checkpoints.finish()
    if world_rank() == 0:
        console.print(render_scores(scores))
        console.print(f"Scores written to {output.path}")
    return scores


def _make_store(folder: str | None, memory_gb: float) -> TensorStore:
    return HostStore() if folder is None else SpoolStore(Path(folder), int(memory_gb * 1e9))


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Leave out what Megatron warns of on every rank and no user of a job can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning)
        # The router's type is the model's own.
        warnings.filterwarnings("ignore", message="Using a large number of experts", category=UserWarning)
        with without_deprecation_log():
            yield


def _checkpoint_plan(config: JobConfig) -> CheckpointPlan | None:
    if config.run.checkpoint_dir is None:
        return None
    return CheckpointPlan(
        Path(config.run.checkpoint_dir),
        interval=config.run.checkpoint_interval,
        seconds=config.run.checkpoint_seconds,
        afresh=config.run.resume == "never",
        # Before the other ranks stop waiting, so that all end with the error of the storage.
        storage_seconds=config.run.timeout_minutes * 60 / 4,
    )
