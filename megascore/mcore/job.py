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

from megascore.errors import ConfigError, DataError
from megascore.mcore.build import build_model
from megascore.mcore.huggingface.config import HuggingFaceModelConfig, read_config
from megascore.mcore.huggingface.load import Checkpoint, load_weights
from megascore.mcore.layout import check_divisible, check_sequence_length
from megascore.mcore.schedule import forward_only
from megascore.mcore.view import MegatronModelView
from megascore.mcore.world import local_device, parallel_world
from megascore.parallel.comm import agree, broadcast_object, sum_in_place, world_rank
from megascore.scoring.config import JobConfig
from megascore.scoring.data import (
    Samples,
    check_enough_samples,
    check_equal_shares,
    check_source,
    load_samples,
    micro_batches_of_step,
    num_steps,
    share_samples,
)
from megascore.scoring.dry_run import render_sites
from megascore.scoring.fingerprint import weights_fingerprint
from megascore.scoring.progress import ScoringProgress
from megascore.scoring.recipes import check_iterations, resolve_scores
from megascore.scoring.report import render_scores
from megascore.scoring.run import ScoringRun
from megascore.scoring.score_file import Scores, check_output_path

__all__ = ["run_job"]


def run_job(config: JobConfig, console: Console) -> Scores | None:
    """Run a scoring job and write its score file.

    Collective over the world that torchrun started; a world of one without torchrun.

    Args:
        config: What to do.
        console: Where rank 0 shows progress and result.

    Returns:
        The scores, the same on every rank; None for a dry run (``run.steps=0``).

    Raises:
        MegascoreError: a wrong config, model, text, layout or output path, before anything long starts. The rank that
            found it raises what it found, the others `RankFailure`.
    """
    timeout = timedelta(minutes=config.run.timeout_minutes)
    device = local_device(config.run.device)
    with _quiet_megatron(), parallel_world(config.parallel, device, timeout):
        model_config = agree("checking the job", lambda: _check(config))
        inputs = _read_inputs(config, model_config.vocab_size)
        chunks = agree("loading the model", lambda: _load_model(config, model_config, device))
        requests = resolve_scores(config.scores)
        total = _total_steps(config, inputs.samples)
        if config.run.steps != 0:
            agree("checking the scores", lambda: check_iterations(requests, total))
        with ScoringRun(MegatronModelView(chunks), requests, _metadata(config, inputs)) as run:
            if config.run.steps == 0:
                render_sites(run, console)
                return None
            loss = _run_steps(config, run, chunks, inputs.samples, total, console)
        scores = run.finish({"loss": loss})
        agree("writing the score file", lambda: scores.save(config.run.output, overwrite=config.run.overwrite))
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
        check_output_path(config.run.output, overwrite=config.run.overwrite)
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


def _run_steps(
    config: JobConfig, run: ScoringRun, chunks: Sequence[GPTModel], samples: Samples, total: int, console: Console
) -> float | None:
    """Run the data through the model; return the mean loss in nats per token. Collective over the world."""
    num_samples = len(samples.tokens)
    data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    device = next(chunks[0].parameters()).device
    loss_sums = torch.zeros(2, dtype=torch.float64, device=device)
    tokens_per_step = config.run.global_batch_size * config.data.sequence_length
    with ScoringProgress(total, tokens_per_step, enabled=world_rank() == 0, console=console) as progress:
        for step in range(total):
            batch, micro_batch = config.run.global_batch_size, config.run.micro_batch_size
            slices = micro_batches_of_step(step, num_samples, batch, micro_batch, data_rank, data_size)
            micro_batches = [samples.tokens[part].to(device) for part in slices]
            losses = forward_only(chunks, micro_batches, config.run.loss, samples.masks_of(slices), run)
            loss_sums[0] += losses.nats
            loss_sums[1] += losses.num_tokens
            run.step()
            progress.advance(samples.num_tokens(slice(step * batch, (step + 1) * batch)))
    if not config.run.loss:
        return None
    # Tensor-parallel ranks of the last stage hold the same loss: one of them counts.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        loss_sums.zero_()
    sum_in_place([loss_sums])
    # Documents of one token each predict nothing.
    return float(loss_sums[0] / loss_sums[1]) if float(loss_sums[1]) else None


def _metadata(config: JobConfig, inputs: _Inputs) -> dict[str, Any]:
    kind, path = config.data.source()
    field = {"field": config.data.field} if kind in ("jsonl", "dataset") else {}
    return {
        "model": {"name": Path(config.model.hf or "").resolve().name, "dtype": config.model.dtype},
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
