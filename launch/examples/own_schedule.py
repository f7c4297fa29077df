"""Scoring in a pipeline schedule written by hand: torchrun --nproc-per-node 2 launch/examples/own_schedule.py ..."""

from __future__ import annotations

import demo
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

import megascore


@torch.no_grad()
def pass_through_pipeline(model: GPTModel, tokens: Tensor) -> None:
    """Run one micro-batch [B, S] through the stages, each of which waits for the one before."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stage, num_stages = dist.get_rank(group), dist.get_world_size(group)
    device = next(model.parameters()).device
    if stage > 0:
        hidden = torch.empty(tokens.shape[1], len(tokens), model.config.hidden_size, device=device)
        dist.recv(hidden, group_src=stage - 1, group=group)
        model.set_input_tensor(hidden)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    output = model(tokens.to(device), positions, None)
    if stage < num_stages - 1:
        dist.send(output, group_dst=stage + 1, group=group)


def main(checkpoint: str, output: str) -> None:
    """Score a model in two pipeline stages."""
    with demo.megatron_model(checkpoint, pipeline=2) as model:
        # Every rank attaches to the layers that it has. Names and numbers of layers in the result are the model's.
        with megascore.attach(model, recipe="minitron") as run:
            for batch in demo.batches(model.vocab_size):
                for tokens in torch.split(batch, 1):
                    pass_through_pipeline(model, tokens)
                # Once for each step, on all ranks, however many micro-batches a step has. Here ranks may talk about
                # scores; in the forward passes above they don't, so the schedule is left as it is.
                run.step()
        scores = run.finish()
        # The same scores on every rank; rank 0 writes.
        scores.save(output)


if __name__ == "__main__":
    main(*demo.arguments(__doc__))
