"""A job that runs the whole model, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from megascore.job.inputs import JobInputs, load_chunks
from megascore.job.loss import LossTotal
from megascore.job.watch import Watch
from megascore.mcore.pipeline.gradients import GradientPasses
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.pipeline.without_layers import WithoutLayers
from megascore.mcore.sites.view import MegatronModelView
from megascore.parallel.comm import agree
from megascore.runs.scoring_run import ScoringRun
from megascore.runs.steps import Cursor, run_steps
from megascore.runs.until import Until
from megascore.scores.score_file import Scores

__all__ = ["run_full_pass"]


def run_full_pass(inputs: JobInputs, watch: Watch) -> Scores:
    """Return the scores of a job. Collective over the world.

    Args:
        inputs: The model, the samples, and what is scored.
        watch: What happens between steps.

    Raises:
        MegascoreError: the model, the scores or the checkpoint do not fit.
        Preempted: a signal came, and everything is saved.
    """
    chunks = agree("loading the model", lambda: load_chunks(inputs))
    until = Until(inputs.until)
    with ScoringRun(MegatronModelView(chunks), inputs.requests, inputs.metadata) as run:
        loss = LossTotal(inputs.form.device)
        if watch.snapshot is not None:
            run.restore(watch.snapshot.states, watch.snapshot.step)
            loss.restore(watch.snapshot.sums["loss"])
        watch.begin(inputs.total_steps)
        _run_data(inputs, chunks, run, loss, watch, until)
        mean_loss = loss.mean() if inputs.computes_loss else None
    return run.finish({"loss": mean_loss, **until.facts()}, keep_statistics=inputs.keep_statistics)


def _run_data(
    inputs: JobInputs, chunks: Sequence[nn.Module], run: ScoringRun, loss: LossTotal, watch: Watch, until: Until
) -> None:
    """Run the steps that are left, with what happens between them."""
    samples, share, total = inputs.samples, inputs.share, inputs.total_steps
    device, start = inputs.form.device, run.num_steps
    further = [
        passes for passes in (WithoutLayers.of(chunks, run), GradientPasses.of(chunks, run)) if passes is not None
    ]

    def steps() -> Iterator[int]:
        for step in range(start, total):
            if until.is_reached(run):
                return
            yield step

    def between(step: int, *, is_last: bool = False) -> None:
        tokens = samples.num_tokens(slice(share.samples(step).start))
        cursor = Cursor(step, None, chunks)
        watch.between(cursor, tokens, run, {"step": step}, loss.sums, is_last=is_last)

    def run_step(step: int) -> None:
        slices = share.micro_batches(step, samples.num_samples)
        micro_batches = [samples.tokens_of(part).to(device, non_blocking=True) for part in slices]
        masks = samples.masks_of(slices)
        loss.add(forward_only(chunks, micro_batches, inputs.computes_loss, masks, run))
        for passes in further:
            passes.run(micro_batches, masks)

    tokens_per_step = share.global_batch_size * inputs.form.sequence_length
    with watch.progress(total, tokens_per_step, start) as progress:

        def count(step: int) -> None:
            progress.advance(samples.num_tokens(share.samples(step)))

        run_steps(steps(), run_step, [run], before=between, after=count)
        between(run.num_steps, is_last=True)
    until.tell(run.num_steps, total)
