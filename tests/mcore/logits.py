"""Logits and losses of models on ranks, beside those of transformers and of one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.pipeline.schedule import forward_only
from megascore.mcore.world.parallel_world import parallel_world
from tests.models import reference_logits, save_checkpoint
from tests.pool import WorkerPool

__all__ = [
    "CPU",
    "NUM_SAMPLES",
    "SEQUENCE_LENGTH",
    "TIMEOUT",
    "Expected",
    "Output",
    "relative_difference",
    "run",
    "run_models",
    "run_one",
]

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)
NUM_SAMPLES, SEQUENCE_LENGTH, MICRO_BATCH_SIZE = 5, 48, 2


@dataclass
class Output:
    """What one rank made of all samples; logits [B, S, V] on the last stage."""

    logits: Tensor | None
    nats: float
    num_tokens: int


def run(chunks: list[GPTModel], tokens: Tensor, *, compute_loss: bool) -> Output:
    local_logits: list[Tensor] = []
    if chunks[-1].post_process:
        chunks[-1].output_layer.register_forward_hook(lambda _module, _args, output: local_logits.append(output[0]))
    loss = forward_only(chunks, list(torch.split(tokens, MICRO_BATCH_SIZE)), compute_loss)
    logits = [gather_from_tensor_model_parallel_region(local).transpose(0, 1) for local in local_logits]
    return Output(torch.cat(logits) if logits else None, loss.nats.item(), loss.num_tokens)


def run_models(directories: dict[str, Path], parallel: ParallelConfig, tokens: Tensor) -> dict[tuple[str, str], Output]:
    with parallel_world(parallel, CPU, TIMEOUT):
        return {
            (name, dtype): run(
                load_model(ModelConfig(hf=str(directory), dtype=dtype), parallel, CPU, SEQUENCE_LENGTH),
                tokens,
                compute_loss=True,
            )
            for name, directory in directories.items()
            for dtype in ("float32", "float64")
        }


def run_one(directory: Path, parallel: ParallelConfig, tokens: Tensor) -> Output:
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float64"), parallel, CPU, SEQUENCE_LENGTH)
        return run(chunks, tokens, compute_loss=True)


@dataclass(frozen=True)
class Expected:
    """Checkpoints by name, and what they make of the same tokens."""

    directories: dict[str, Path]
    tokens: Tensor
    logits: dict[str, Tensor]
    """Of transformers, in float32."""
    on_one_process: dict[tuple[str, str], Output]
    """By name and dtype."""

    @classmethod
    def of(cls, models: Mapping[str, tuple[str, dict[str, Any]]], root: Path, world: WorkerPool) -> Expected:
        """Save models, given by family and changes, and run them."""
        directories = {
            name: save_checkpoint(root / name, family, **changes) for name, (family, changes) in models.items()
        }
        tokens = torch.randint(0, 128, (NUM_SAMPLES, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))
        logits = {name: reference_logits(directory, tokens) for name, directory in directories.items()}
        alone = world.run(1, run_models, directories, ParallelConfig(), tokens)[0]
        return cls(directories, tokens, logits, alone)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).abs().max() / reference.double().abs().max())
