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
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from rich.console import Console

from megascore.errors import ConfigError, DataError
from megascore.mcore.layout import check_sequence_length, exchanges_tokens
from megascore.mcore.schedule import forward_only
from megascore.mcore.source import ModelSource, model_source
from megascore.mcore.view import MegatronModelView
from megascore.mcore.world import local_device, parallel_world
from megascore.parallel.comm import agree, sum_in_place, world_rank
from megascore.scoring.config import JobConfig
from megascore.scoring.data import (
    Samples,
    check_enough_samples,
    check_equal_shares,
    load_samples,
    micro_batches_of_step,
    num_steps,
)
from megascore.scoring.dry_run import render_sites
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
        source = agree("checking the job", lambda: _check(config))
        inputs = _read_inputs(config, source)
        chunks = agree("loading the model", lambda: _load_model(config, source, inputs, device))
        requests = resolve_scores(config.scores)
        total = _total_steps(config, inputs.samples)
        if config.run.steps != 0:
            agree("checking the scores", lambda: check_iterations(requests, total))
        with ScoringRun(MegatronModelView(chunks), requests, _metadata(config, inputs, source)) as run:
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


def _check(config: JobConfig) -> ModelSource:
    """Find what is wrong with a job before anything long starts; every rank looks at what it will need itself."""
    source = model_source(config.model)
    if source.tokenizer is None:
        raise ConfigError(
            "the text needs the model's tokenizer: give a Hugging Face directory that has it in model.hf."
        )
    if config.data.text is None:
        raise ConfigError("data.text is not given: expected a UTF-8 text file.")
    source.check(config.parallel)
    check_sequence_length(config.data.sequence_length, config.parallel)
    if world_rank() == 0:
        if not Path(config.data.text).is_file():
            raise DataError(f"text {config.data.text} not found: data.text names a UTF-8 file.")
        check_output_path(config.run.output, overwrite=config.run.overwrite)
    return source


@dataclass(frozen=True)
class _Inputs:
    """What rank 0 reads for all."""

    samples: Samples
    weights_fingerprint: str


def _read_inputs(config: JobConfig, source: ModelSource) -> _Inputs:
    """Read text and fingerprints on rank 0, and give them to all. Collective over the world."""
    data, text, folder = config.data, config.data.text, source.tokenizer
    assert text is not None
    assert folder is not None

    def read() -> _Inputs | None:
        if world_rank() != 0:
            return None
        samples = load_samples(text, folder, data.sequence_length, data.num_samples, config.run.seed)
        data_size = parallel_state.get_data_parallel_world_size()
        check_enough_samples(len(samples.tokens), data_size)
        if exchanges_tokens(config.parallel):
            check_equal_shares(len(samples.tokens), config.run.global_batch_size, data_size)
        largest = int(samples.tokens.max())
        if source.vocab_size is not None and largest >= source.vocab_size:
            raise DataError(
                f"the tokenizer in {folder} gives token {largest}, but the model there has {source.vocab_size} tokens: "
                "tokenizer and weights are not of one model."
            )
        return _Inputs(samples, source.fingerprint())

    box = [agree("reading the text", read)]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _load_model(config: JobConfig, source: ModelSource, inputs: _Inputs, device: torch.device) -> list[GPTModel]:
    dtype = getattr(torch, config.model.dtype)
    chunks = source.build(config.parallel, dtype, device, config.data.sequence_length)
    source.check_tokens(chunks, int(inputs.samples.tokens.max()))
    if config.run.steps != 0:
        source.load(chunks)
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
            losses = forward_only(chunks, micro_batches, compute_loss=config.run.loss)
            loss_sums[0] += losses.nats
            loss_sums[1] += losses.num_tokens
            run.step()
            progress.advance(min(batch, num_samples - step * batch) * config.data.sequence_length)
    if not config.run.loss:
        return None
    # Tensor-parallel ranks of the last stage hold the same loss: one of them counts.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        loss_sums.zero_()
    sum_in_place([loss_sums])
    return float(loss_sums[0] / loss_sums[1])


def _metadata(config: JobConfig, inputs: _Inputs, source: ModelSource) -> dict[str, Any]:
    text, length = Path(inputs.samples.source).name, config.data.sequence_length
    return {
        "model": {"name": source.name, "dtype": config.model.dtype},
        "weights_fingerprint": inputs.weights_fingerprint,
        "data_fingerprint": inputs.samples.fingerprint,
        "data": {"text": text, "sequence_length": length, "seed": config.run.seed},
    }
