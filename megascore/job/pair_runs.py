"""Runs of smaller models beside their parent: the same micro-batches through both, compared where the logits are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megascore.job.inputs import JobInputs
from megascore.masks.masked import masked_view
from megascore.mcore.pipeline.pairs import PAIR_SUMS, compare_predictions, predictions
from megascore.mcore.sites.view import MegatronModelView
from megascore.mcore.world.groups import is_first_tensor_rank
from megascore.parallel.comm import sum_in_place, world_rank
from megascore.plans.units import Units
from megascore.runs.progress import ScoringProgress

__all__ = ["Candidate", "pair_sums"]


@dataclass(frozen=True)
class Candidate:
    """A smaller model: the parent with some of its units alone, or a model of its own."""

    name: str
    units: Units | None = None
    chunks: Sequence[Any] | None = None
    """Its chunks on this rank; None where the parent is masked."""

    def masks(self, view: MegatronModelView) -> AbstractContextManager[None]:
        """Return what masks the parent while this candidate runs."""
        if self.units is None:
            return nullcontext()
        return masked_view(view, self.units, int(view.facts["num_attention_heads"]))


def pair_sums(
    inputs: JobInputs, chunks: Sequence[Any], candidates: Sequence[Candidate], console: Console
) -> Mapping[str, Tensor]:
    """Run all samples through the parent and each candidate. Collective over the world.

    Args:
        inputs: The samples and how they are shared.
        chunks: The parent on this rank.
        candidates: The same on every rank; names differ.
        console: Where rank 0 shows progress.

    Returns:
        For each candidate [samples, 6] float64 on the CPU of every rank, by ``PAIR_SUMS``.

    Raises:
        PlanError: a candidate can't be masked in this model.
    """
    samples, share, device = inputs.samples, inputs.share, inputs.form.device
    view = MegatronModelView(chunks)
    own = {
        candidate.name: torch.zeros(samples.num_samples, len(PAIR_SUMS), dtype=torch.float64)
        for candidate in candidates
    }
    # Ranks of one tensor-parallel group have the same sums: one of them counts.
    counts = is_first_tensor_rank()
    tokens_per_step = share.global_batch_size * inputs.form.sequence_length
    progress = ScoringProgress(
        inputs.total_steps, tokens_per_step, enabled=world_rank() == 0, console=console, what="evaluating"
    )
    with progress:
        for step in range(inputs.total_steps):
            for part in share.micro_batches(step, samples.num_samples):
                tokens = samples.tokens_of(part).to(device, non_blocking=True)
                mask = samples.mask_of(part)
                parent = predictions(chunks, tokens)
                for candidate in candidates:
                    with candidate.masks(view):
                        smaller = predictions(chunks if candidate.chunks is None else candidate.chunks, tokens)
                    if parent is not None and smaller is not None:
                        sums = compare_predictions(parent, smaller, tokens, mask).cpu()
                        if counts:
                            own[candidate.name][part] += sums
            progress.advance(samples.num_tokens(share.samples(step)))
    sum_in_place(list(own.values()))
    return own
