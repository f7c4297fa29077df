"""Model and data of the examples: a Hugging Face checkpoint in Megatron-Core, made-up text. Your program has its own.

Every example runs as ``torchrun --nproc-per-node 2 launch/examples/NAME.py CHECKPOINT OUTPUT``, on GPUs or CPUs, with
any checkpoint directory that `megascore score` takes (`megatron_loop.py` splits its KV heads over the two ranks).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import local_device, parallel_world

NUM_STEPS, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH = 3, 4, 32


def arguments(description: str | None) -> tuple[str, str]:
    """The checkpoint directory and the score file to write."""
    parser = argparse.ArgumentParser(
        description=description, usage="torchrun --nproc-per-node 2 %(prog)s [-h] CHECKPOINT OUTPUT"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Hugging Face folder of the model")
    parser.add_argument("output", metavar="OUTPUT", help="score file to write")
    given = parser.parse_args()
    return given.checkpoint, given.output


@contextmanager
def megatron_model(checkpoint: str, **degrees: int | bool) -> Iterator[GPTModel]:
    """Initialise torch.distributed and Megatron's groups, and build this rank's part of the model."""
    parallel, device = ParallelConfig(**degrees), local_device()  # type: ignore[arg-type]
    with parallel_world(parallel, device, timedelta(minutes=10)):
        model = load_model(ModelConfig(hf=checkpoint, dtype="float32"), parallel, device, SEQUENCE_LENGTH)[0]
        yield model


def batches(vocab_size: int) -> Iterator[Tensor]:
    """Yield the global batch of each step, [samples, sequence] int64, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_STEPS):
        yield torch.randint(vocab_size, (GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH), generator=generator)
