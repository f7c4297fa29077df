"""One process as any rank of a world that nobody started: groups and shapes are real, values and messages are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megascore.config import ParallelConfig
from megascore.errors import ConfigError
from megascore.mcore.world.parallel_world import parallel_world

__all__ = ["META", "kinds_of_ranks", "pretended_world"]

META = torch.device("meta")
"""Its tensors have shape and type, and take no memory."""


@contextmanager
def pretended_world(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world whose other ranks are made up; tensors are made on the meta device.

    Collectives return at once and leave their tensors as they are, so they are good for shapes only.

    Args:
        parallel: Degrees of the axes.
        rank: Which rank to be.
        world_size: Processes of the world.

    Raises:
        ConfigError: this PyTorch cannot pretend.
        LayoutError: the layout does not fit the world.
    """
    with _fake_process_group(rank, world_size), parallel_world(parallel, META, timedelta(minutes=1)), META:
        stage, experts = _part_of_model(parallel, rank, world_size)
        assert stage == parallel_state.get_pipeline_model_parallel_rank(), "Megatron orders its ranks otherwise"
        assert experts == parallel_state.get_expert_model_parallel_rank(), "Megatron orders its ranks otherwise"
        yield


def kinds_of_ranks(parallel: ParallelConfig, world_size: int) -> list[tuple[int, ...]]:
    """Group the ranks by the part of the model that they have: pipeline stage and experts.

    Ranks of a group differ in their position on the other axes, which split everything evenly.
    """
    kinds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(world_size):
        kinds[_part_of_model(parallel, rank, world_size)].append(rank)
    return [tuple(ranks) for _, ranks in sorted(kinds.items())]


def _part_of_model(parallel: ParallelConfig, rank: int, world_size: int) -> tuple[int, int]:
    """Return pipeline stage and expert-parallel rank: Megatron numbers stages last, expert tensor axis first."""
    stage = rank // (world_size // parallel.pipeline)
    return stage, rank // parallel.expert_tensor % parallel.expert


@contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    try:
        # Private, and the only place that knows it; importing it makes the backend known.
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} cannot pretend {world_size} processes ({error}): start the dry run in its own "
            f"world, torchrun --nproc-per-node {world_size} -m megascore score CONFIG run.steps=0."
        ) from error
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
