"""Scoring in the manner of Megatron-LM: torchrun --nproc-per-node 2 launch/examples/megatron_loop.py ..."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import demo
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import megascore

MICRO_BATCH_SIZE = 1


def loss_func(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of a micro-batch, as in Megatron-LM's pretrain_gpt.py."""
    loss = (losses.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss}


def forward_step_func(data_iterator: Iterator[Tensor], model: GPTModel) -> tuple[Tensor, Any]:
    """Run one micro-batch. Scoring has no part in it."""
    tokens = next(data_iterator).to(next(model.parameters()).device)
    labels, mask = tokens.roll(-1, dims=1), torch.ones_like(tokens)
    mask[:, -1] = 0
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels)
    return losses, partial(loss_func, mask)


def main(checkpoint: str, output: str) -> None:
    """Score a model that is tensor-parallel, with sequence parallelism; all other layouts run in the same loop."""
    with demo.megatron_model(checkpoint, tensor=2, sequence=True) as model:
        forward_backward_func = get_forward_backward_func()
        # With virtual pipelining give attach and the schedule the list of chunks. Models may be wrapped (DDP,
        # Float16Module), and are in evaluation mode inside the block: dropout would be measured otherwise.
        with megascore.attach(model, scores=[{"target": "ffn"}, {"target": "kv_heads"}, {"target": "layers"}]) as run:
            for batch in demo.batches(model.vocab_size):
                # Each data-parallel rank has its part of the batch, as in training; ranks of one replica have the same.
                rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
                micro_batches = torch.split(batch[rank::size], MICRO_BATCH_SIZE)
                with torch.no_grad():
                    forward_backward_func(
                        forward_step_func=forward_step_func,
                        data_iterator=iter(micro_batches),
                        model=model,
                        num_microbatches=len(micro_batches),
                        seq_length=batch.shape[1],
                        micro_batch_size=MICRO_BATCH_SIZE,
                        # Hooks see forward passes: with recomputation in a backward pass they would see them twice.
                        forward_only=True,
                    )
                run.step()
        run.finish({"data": {"name": "made-up tokens"}}).save(output)


if __name__ == "__main__":
    main(*demo.arguments(__doc__))
