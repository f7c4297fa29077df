"""The steps of a job: data through the model, and between two steps whatever a checkpoint has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from megascore.config import JobConfig
from megascore.data import OwnSamples, micro_batches_of_step
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.groups import data_axis, is_first_tensor_rank
from megascore.parallel.comm import sum_in_place, world_rank
from megascore.resume.checkpointing import Checkpointer
from megascore.resume.snapshot import Snapshot
from megascore.runs.progress import ScoringProgress
from megascore.runs.scoring_run import ScoringRun

__all__ = ["LossTotal", "progress_entries", "progress_facts", "run_steps", "slices_of_step"]


def run_steps(
    config: JobConfig,
    run: ScoringRun,
    chunks: Sequence[nn.Module],
    samples: OwnSamples,
    total: int,
    console: Console,
    checkpoints: Checkpointer | None = None,
    snapshot: Snapshot | None = None,
) -> float | None:
    """Run the data through the model; return the mean loss in nats per token. Collective over the world.

    Args:
        config: The job.
        run: Hooks are on.
        chunks: The model on this rank.
        samples: Those of this rank.
        total: Steps of the whole run.
        console: Where rank 0 shows how far it is.
        checkpoints: Where the run saves; None for a run that does not.
        snapshot: What it goes on from; its states are in the hooks already.

    Raises:
        Preempted: a signal came, and everything is saved.
    """
    loss = LossTotal(next(chunks[0].parameters()).device)
    start = 0
    if snapshot is not None:
        loss.restore(snapshot.sums["loss"])
        start = snapshot.step
    batch_size = config.run.global_batch_size
    with ScoringProgress(
        total, batch_size * config.data.sequence_length, enabled=world_rank() == 0, done_steps=start, console=console
    ) as progress:
        for step in range(start, total + 1):
            if checkpoints is not None:
                entries = progress_entries(progress, samples.num_tokens(slice(step * batch_size)))
                checkpoints.between_steps(run, {"step": step}, loss.sums, is_last=step == total, progress=entries)
            if step == total:
                break
            _run_step(config, step, run, chunks, samples, loss)
            run.step()
            progress.advance(samples.num_tokens(slice(step * batch_size, (step + 1) * batch_size)))
    return loss.mean() if config.run.loss else None


class LossTotal:
    """The loss over all tokens so far, as sums: [nats, tokens] float64 on every rank, that are added up on demand."""

    def __init__(self, device: torch.device) -> None:
        """Start at nothing."""
        self._own = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, nats: Tensor | float, num_tokens: int) -> None:
        """Add this rank's losses of some micro-batches."""
        self._own[0] += nats
        self._own[1] += num_tokens

    def sums(self) -> Mapping[str, Tensor]:
        """Return the sums over all ranks. Collective over the world."""
        merged = self._own.clone()
        # Tensor-parallel ranks of the last stage hold the same loss: one of them counts.
        if not is_first_tensor_rank():
            merged.zero_()
        sum_in_place([merged])
        return {"loss": merged.cpu()}

    def restore(self, merged: Tensor) -> None:
        """Take over what `sums` returned. All ranks do it, and the first one has it then."""
        self._own.zero_()
        if world_rank() == 0:
            self._own.copy_(merged)

    def mean(self) -> float | None:
        """Return the mean loss in nats per token; None where documents of one token each predict nothing.

        Collective over the world.
        """
        nats, num_tokens = self.sums()["loss"].tolist()
        return float(nats / num_tokens) if num_tokens else None


def _run_step(
    config: JobConfig, step: int, run: ScoringRun, chunks: Sequence[nn.Module], samples: OwnSamples, loss: LossTotal
) -> None:
    device = next(chunks[0].parameters()).device
    slices = slices_of_step(config, step, samples)
    micro_batches = [samples.tokens_of(part).to(device, non_blocking=True) for part in slices]
    losses = forward_only(chunks, micro_batches, config.run.loss, samples.masks_of(slices), run)
    loss.add(losses.nats, losses.num_tokens)


def slices_of_step(config: JobConfig, step: int, samples: OwnSamples) -> list[slice]:
    """Return this rank's micro-batches of a step, as slices of the samples."""
    data = data_axis()
    return micro_batches_of_step(
        step, samples.num_samples, config.run.global_batch_size, config.run.micro_batch_size, data.rank, data.size
    )


def progress_facts(config: JobConfig) -> dict[str, Any]:
    """Return what the progress file says of the job, however it runs."""
    return {"output": config.run.output, "layout": asdict(config.parallel)}


def progress_entries(progress: ScoringProgress, tokens: int) -> dict[str, float | int | None]:
    """Return what the progress file says of the pace, and of the tokens so far."""
    rate, left = progress.tokens_per_second, progress.seconds_left
    return {
        "tokens": tokens,
        "tokens_per_second": None if rate is None else round(rate, 1),
        "eta_seconds": None if left is None else round(left, 1),
    }
