"""Functions that a user could name in ``model.provider``."""

from __future__ import annotations

import os
from typing import Any

import torch

from megascore.config import ParallelConfig
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.models.load_huggingface import HuggingFaceWeights
from megascore.weights.huggingface.config import read_config

CHECKPOINT = "MEGASCORE_TEST_CHECKPOINT"
"""Environment variable with the Hugging Face directory that these functions build their models of."""
NOT_CALLABLE = 3
calls: list[dict[str, Any]] = []


def _build(parallel: ParallelConfig) -> list[Any]:
    architecture = read_config(os.environ[CHECKPOINT]).architecture
    return build_gpt(architecture, parallel, torch.float32, torch.device("cpu"), 16)


def whole(parallel: ParallelConfig) -> Any:
    """Return all chunks of this rank at once, with their weights."""
    chunks = _build(parallel)
    HuggingFaceWeights(read_config(os.environ[CHECKPOINT]), os.environ[CHECKPOINT]).load(chunks)
    return chunks


def running_twice(parallel: ParallelConfig) -> Any:
    """Return `whole`, whose first layer runs its FFN twice in each pass."""
    chunks = whole(parallel)
    for chunk in chunks:
        for layer in chunk.decoder.layers[: chunk.pre_process]:
            layer.mlp.register_forward_hook(run_again)
    return chunks


def run_again(module: torch.nn.Module, args: Any, output: Any) -> None:
    module.forward(*args)


class Wrapper(torch.nn.Module):
    """As Megatron's Float16Module and DistributedDataParallel wrap a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any) -> Any:
    """Return one chunk, without weights, as Megatron-LM's function of this name does."""
    from megatron.core import parallel_state

    calls.append({"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage})
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    parallel = ParallelConfig(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline=virtual,
    )
    return Wrapper(_build(parallel)[vp_stage or 0])


def moved() -> Any:
    """Move the model, which a job does itself."""
    (chunk,) = _build(ParallelConfig())
    return chunk.to("cpu", torch.float64).to(torch.float32)


def nothing() -> None:
    """Forget to return the model."""


def plain() -> Any:
    """Return what Megatron cannot run."""
    return torch.nn.Linear(2, 2)


def unsplit() -> Any:
    """Return a model of a layout that was not asked for."""
    return _build(ParallelConfig(sequence=False))


def three() -> Any:
    """Return more chunks than there are."""
    return _build(ParallelConfig()) * 3


def demanding(args: Any, config: Any) -> None:
    """Need what nobody gives."""
