"""Running micro-batches forward through Megatron's own pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megascore.mcore.pipeline.token_losses import Predictions, token_losses
from megascore.mcore.world.context_parallel import local_positions
from megascore.runs.scoring_run import ScoringRun

__all__ = [
    "LossSums",
    "MicroBatch",
    "empty_hidden_states",
    "forward_only",
    "forward_step",
    "output_layers",
]

MicroBatch = tuple[Tensor, "Tensor | None"]
"""Token numbers [B, S] int64, and which of them count, [B, S] bool; None: all."""
ForwardStep = Callable[[Iterator[MicroBatch], GPTModel], tuple[Tensor, Any]]


@dataclass(frozen=True)
class LossSums:
    """Next-token loss of some sequences, as sums; zeros on ranks that do not have the model's output."""

    nats: Tensor
    """[] float64, negative log-likelihood summed over the predicted tokens; on the device of the model."""
    num_tokens: int
    """Predicted tokens: those of each sequence that count, except its first."""


@torch.no_grad()
def forward_only(
    model_chunks: Sequence[GPTModel],
    micro_batches: Sequence[Tensor],
    compute_loss: bool,
    masks: Sequence[Tensor] | None = None,
    run: ScoringRun | None = None,
) -> LossSums:
    """Run micro-batches through the model, causally masked, for what hooks see of it.

    Collective over tensor, context and pipeline ranks, which must give the same micro-batches, whole sequences each;
    data-parallel ranks may differ in all of it. Nothing happens without micro-batches.

    Args:
        model_chunks: The virtual-pipeline chunks of this rank.
        micro_batches: Token numbers, [B, S] int64 each.
        compute_loss: Whether to compute the loss; without it the output layer is not run at all.
        masks: Which tokens of each micro-batch count, [B, S] bool each, best in host memory. Others have no part in the
            loss nor in the scores. None counts all.
        run: The scoring run whose hooks are on the model; it is told the mask of each micro-batch when that runs.

    Returns:
        The loss on the last pipeline stage, of this context-parallel rank's tokens and the same on tensor-parallel
        ranks; zeros elsewhere.
    """
    device = next(model_chunks[0].parameters()).device
    nats, num_tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    all_counted: Sequence[Tensor | None] = [None] * len(micro_batches)
    given: list[MicroBatch] = list(zip(micro_batches, all_counted if masks is None else masks, strict=True))
    with output_layers(model_chunks, run=compute_loss):
        for _, group in groupby(given, key=lambda micro_batch: micro_batch[0].shape):
            for losses in _run_group(model_chunks, list(group), device, compute_loss, run):
                nats += losses.nats
                num_tokens += losses.num_tokens
    return LossSums(nats, num_tokens)


def _run_group(
    model_chunks: Sequence[GPTModel],
    micro_batches: list[MicroBatch],
    device: torch.device,
    compute_loss: bool,
    run: ScoringRun | None,
) -> list[LossSums]:
    """Losses of micro-batches of one shape; empty where the loss is off or not at hand."""
    step = partial(forward_step, device=device, compute_loss=compute_loss, run=run)
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    if len(model_chunks) > 1 and len(micro_batches) < num_stages:
        return _run_rounds(model_chunks, micro_batches, device, step)
    if len(model_chunks) > 1:
        # One group for all of them: Megatron refuses remainders smaller than the pipeline.
        model_chunks[0].config.microbatch_group_size_per_vp_stage = len(micro_batches)
    batch_size, sequence_length = micro_batches[0][0].shape
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in model_chunks],
        model=list(model_chunks),
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [losses for losses in results if losses is not None]


def _run_rounds(
    model_chunks: Sequence[GPTModel], micro_batches: list[MicroBatch], device: torch.device, step: ForwardStep
) -> list[LossSums]:
    """What Megatron's interleaved schedule refuses: fewer micro-batches than stages.

    They go round the stages once for each chunk. With fewer messages than stages there is always a rank that is not
    waiting to send, so blocking sends cannot lock.
    """
    config = model_chunks[0].config
    group = parallel_state.get_pipeline_model_parallel_group()
    previous_rank = parallel_state.get_pipeline_model_parallel_prev_rank()
    next_rank = parallel_state.get_pipeline_model_parallel_next_rank()
    is_last_stage = dist.get_rank(group) == dist.get_world_size(group) - 1
    results: list[LossSums] = []
    for number, chunk in enumerate(model_chunks):
        for tokens, mask in micro_batches:
            if not chunk.pre_process:
                received = empty_hidden_states(config, tokens.shape, device)
                dist.recv(received, src=previous_rank, group=group)
                chunk.set_input_tensor(received)
            output, losses_of = step(iter([(tokens, mask)]), chunk)
            if is_last_stage and number == len(model_chunks) - 1:
                losses = losses_of(output, non_loss_data=True)
                results.extend([] if losses is None else [losses])
            else:
                dist.send(output.contiguous(), dst=next_rank, group=group)
    return results


def empty_hidden_states(config: TransformerConfig, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return room for what one stage hands to the next, for micro-batches of ``shape`` [B, S] tokens."""
    batch_size, length = shape
    length //= config.context_parallel_size
    if config.sequence_parallel:
        length //= config.tensor_model_parallel_size
    return torch.empty(length, batch_size, config.hidden_size, dtype=config.pipeline_dtype, device=device)


def forward_step(
    micro_batches: Iterator[MicroBatch],
    model: GPTModel,
    *,
    device: torch.device,
    compute_loss: bool,
    run: ScoringRun | None,
) -> tuple[Tensor, Any]:
    """Run the next micro-batch through one chunk, as Megatron's schedules call it.

    Collective over the ranks that share the chunk.

    Returns:
        What the chunk returns, and a function that makes `LossSums` of it where it is logits.
    """
    tokens, mask = next(micro_batches)
    tokens = tokens.to(device, non_blocking=True)
    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    positions = local_positions(tokens.shape[1], cp_rank, cp_size, device)
    # Schedules mix micro-batches, and the hooks see the one that runs here.
    with nullcontext() if run is None else run.masked(mask):
        # Without an attention mask, the layers' own causal one holds: padding on the right is seen by no other token.
        output = model(tokens[:, positions], positions.expand(len(tokens), -1), None)

    def losses(logits: Tensor, *, non_loss_data: bool) -> LossSums | None:
        assert non_loss_data
        if not compute_loss:
            return None
        predictions = Predictions(tokens, mask, device)
        # Models of the user's own making need not say how many of their entries are tokens.
        vocab_size = getattr(model, "vocab_size", None)
        nats = token_losses(logits[:, : predictions.length], predictions.labels, vocab_size)
        if predictions.counted is not None:
            nats = nats.where(predictions.counted, 0.0)
        return LossSums(nats.sum(dtype=torch.float64), predictions.num_counted)

    return output, losses


@contextmanager
def output_layers(model_chunks: Sequence[GPTModel], *, run: bool) -> Iterator[None]:
    """Where they are not to run, a chunk returns its final hidden states, as chunks without an output layer do."""
    having = [chunk for chunk in model_chunks if chunk.post_process and not run]
    for chunk in having:
        chunk.post_process = False
    try:
        yield
    finally:
        for chunk in having:
            chunk.post_process = True
