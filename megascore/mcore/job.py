"""A whole scoring job: check everything, build the model in its layout, run the data through it, write the scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from rich.console import Console

from megascore.errors import ConfigError, DataError, ScoreFileError
from megascore.mcore.build import build_model
from megascore.mcore.huggingface.config import HuggingFaceModelConfig, read_config
from megascore.mcore.huggingface.load import Checkpoint, load_weights
from megascore.mcore.layout import check_divisible, check_sequence_length
from megascore.mcore.steps import run_steps
from megascore.mcore.view import MegatronModelView
from megascore.mcore.world import local_device, parallel_world
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.scoring.checkpointing import Checkpointer, CheckpointPlan
from megascore.scoring.config import JobConfig
from megascore.scoring.data import (
    Samples,
    check_enough_samples,
    check_equal_shares,
    check_source,
    load_samples,
    num_steps,
    share_samples,
)
from megascore.scoring.dry_run import render_sites
from megascore.scoring.fingerprint import weights_fingerprint
from megascore.scoring.recipes import ScoreRequest, check_iterations, resolve_scores
from megascore.scoring.report import render_scores
from megascore.scoring.run import ScoringRun
from megascore.scoring.score_file import Scores, check_output_path, load_scores
from megascore.scoring.snapshot import fingerprint_of, identity_of

__all__ = ["run_job"]


def run_job(config: JobConfig, console: Console) -> Scores | None:
    """Run a scoring job and write its score file.

    Collective over the world that torchrun started; a world of one without torchrun. With ``run.checkpoint_dir`` the
    job saves as it goes; started again, it goes on from there, on any layout, or says that it is finished.

    Args:
        config: What to do.
        console: Where rank 0 shows progress and result.

    Returns:
        The scores, the same on every rank; None for a dry run (``run.steps=0``).

    Raises:
        MegascoreError: a wrong config, model, text, layout or output path, before anything long starts. The rank that
            found it raises what it found, the others `RankFailure`.
        Preempted: a signal asked for it, and everything is saved.
    """
    timeout = timedelta(minutes=config.run.timeout_minutes)
    device = local_device(config.run.device)
    with _quiet_megatron(), parallel_world(config.parallel, device, timeout):
        model_config = agree("checking the job", lambda: _check(config))
        if config.run.checkpoint_dir is None or config.run.steps == 0:
            return _run(config, model_config, device, console, None)
        with Checkpointer(_checkpoint_plan(config, config.run.checkpoint_dir), console) as checkpoints:
            return _run(config, model_config, device, console, checkpoints)


def _run(
    config: JobConfig,
    model_config: HuggingFaceModelConfig,
    device: torch.device,
    console: Console,
    checkpoints: Checkpointer | None,
) -> Scores | None:
    inputs = _read_inputs(config, model_config.vocab_size)
    requests = resolve_scores(config.scores)
    total = _total_steps(config, inputs.samples)
    identity = _identity(config, inputs, requests, total)
    snapshot = None
    if checkpoints is not None:
        finished = _finished_scores(config, identity)
        if finished is not None:
            if world_rank() == 0:
                console.print(f"{config.run.output} holds the finished scores of this run: nothing to do.")
            return finished
        agree("checking the output", lambda: _check_output(config))
        snapshot = checkpoints.find(identity)
    chunks = agree("loading the model", lambda: _load_model(config, model_config, device))
    if config.run.steps != 0:
        agree("checking the scores", lambda: check_iterations(requests, total))
    with ScoringRun(MegatronModelView(chunks), requests, _metadata(config, inputs, identity)) as run:
        if config.run.steps == 0:
            render_sites(run, console)
            return None
        if snapshot is not None:
            run.restore(snapshot.states, snapshot.step)
        if checkpoints is not None:
            checkpoints.begin(total, snapshot, {"output": config.run.output, "layout": dict(run.view.layout)})
        loss = run_steps(config, run, chunks, inputs.samples, total, console, checkpoints, snapshot)
    scores = run.finish({"loss": loss})
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
        yield


def _check(config: JobConfig) -> HuggingFaceModelConfig:
    """Find what is wrong with a job before anything long starts; every rank looks at what it will need itself."""
    if config.model.hf is None:
        raise ConfigError("model.hf is not given: expected a Hugging Face checkpoint directory.")
    config.data.source()
    model_config = read_config(config.model.hf)
    check_divisible(model_config, config.parallel)
    check_sequence_length(config.data.sequence_length, config.parallel)
    with Checkpoint(config.model.hf) as checkpoint:
        checkpoint.check(model_config)
    if world_rank() == 0:
        check_source(config.data)
        # A run with checkpoints may have written its output already: whether it has is known when the data is read.
        check_output_path(config.run.output, overwrite=config.run.overwrite or config.run.checkpoint_dir is not None)
    return model_config


@dataclass(frozen=True)
class _Inputs:
    """What rank 0 reads for all."""

    samples: Samples
    weights_fingerprint: str


def _read_inputs(config: JobConfig, vocab_size: int) -> _Inputs:
    """Read data and fingerprints on rank 0, and give them to all. Collective over the world."""
    folder = config.model.hf
    assert folder is not None

    def read() -> _Inputs | None:
        if world_rank() != 0:
            return None
        samples = load_samples(config.data, folder, config.run.seed)
        data_size = parallel_state.get_data_parallel_world_size()
        check_enough_samples(len(samples.tokens), data_size)
        if config.parallel.expert > 1:
            check_equal_shares(len(samples.tokens), config.run.global_batch_size, data_size)
        largest = int(samples.tokens.max())
        if largest >= vocab_size:
            raise DataError(
                f"{samples.source} gives token {largest}, but the model in {folder} has {vocab_size} tokens: "
                "the data was not tokenized for this model, or tokenizer and weights are not of one model."
            )
        return _Inputs(samples, weights_fingerprint(folder))

    own = agree("reading the data", read)
    samples = share_samples(own.samples if own else None)
    return _Inputs(samples, broadcast_object(own.weights_fingerprint if own else ""))


def _load_model(config: JobConfig, model_config: HuggingFaceModelConfig, device: torch.device) -> list[GPTModel]:
    dtype = getattr(torch, config.model.dtype)
    chunks = build_model(model_config, config.parallel, dtype, device, config.data.sequence_length)
    if config.run.steps != 0:
        load_weights(chunks, model_config, config.model.hf)  # type: ignore[arg-type]
    return chunks


def _total_steps(config: JobConfig, samples: Samples) -> int:
    total = num_steps(len(samples.tokens), config.run.global_batch_size)
    return total if config.run.steps is None else min(total, config.run.steps)


def _checkpoint_plan(config: JobConfig, folder: str) -> CheckpointPlan:
    return CheckpointPlan(
        Path(folder),
        interval=config.run.checkpoint_interval,
        seconds=config.run.checkpoint_seconds,
        afresh=config.run.resume == "never",
        # Before the other ranks stop waiting, so that all end with the error of the storage.
        storage_seconds=config.run.timeout_minutes * 60 / 2,
    )


def _identity(config: JobConfig, inputs: _Inputs, requests: Sequence[ScoreRequest], total: int) -> dict[str, Any]:
    """Return what the results depend on; the layout, batch sizes within a step and paths are not part of it."""
    return identity_of(
        model={"weights_fingerprint": inputs.weights_fingerprint, "dtype": config.model.dtype},
        data={
            "fingerprint": inputs.samples.fingerprint,
            "sequence_length": config.data.sequence_length,
            "num_samples": len(inputs.samples.tokens),
        },
        run={
            "seed": config.run.seed,
            "steps": total,
            "global_batch_size": config.run.global_batch_size,
            "loss": config.run.loss,
        },
        scores=[{"target": r.target, "method": r.method, **dict(r.options)} for r in requests],
    )


def _finished_scores(config: JobConfig, identity: dict[str, Any]) -> Scores | None:
    """Return the scores that this very run has written before, on every rank. Collective over the world."""

    def read() -> Scores | None:
        if world_rank() != 0 or config.run.resume == "never" or not Path(config.run.output).is_file():
            return None
        try:
            scores = load_scores(config.run.output)
        except ScoreFileError:
            # Some other file: whether it may be replaced is asked next.
            return None
        return scores if scores.metadata.get("run_fingerprint") == fingerprint_of(identity) else None

    return broadcast_object(agree("looking for a finished result", read))


def _check_output(config: JobConfig) -> None:
    if world_rank() == 0:
        check_output_path(config.run.output, overwrite=config.run.overwrite)


def _metadata(config: JobConfig, inputs: _Inputs, identity: dict[str, Any]) -> dict[str, Any]:
    kind, path = config.data.source()
    field = {"field": config.data.field} if kind in ("jsonl", "dataset") else {}
    return {
        "model": {"name": Path(config.model.hf or "").resolve().name, "dtype": config.model.dtype},
        "run_fingerprint": fingerprint_of(identity),
        "weights_fingerprint": inputs.weights_fingerprint,
        "data_fingerprint": inputs.samples.fingerprint,
        "data": {
            kind: Path(path).name,
            **field,
            "packing": config.data.packing,
            "sequence_length": config.data.sequence_length,
            "seed": config.run.seed,
        },
    }
