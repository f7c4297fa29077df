"""The parallel world of a run: torch.distributed, Megatron's process groups, and the device of this rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from math import lcm

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megascore.config import ParallelConfig
from megascore.errors import ConfigError, LayoutError, Preempted
from megascore.mcore.cpu.stand_in import cpu_stand_in
from megascore.parallel.comm import agree, leave_world
from megascore.parallel.rendezvous import store_of_environment

__all__ = ["check_world_size", "intended_world_size", "is_alone", "local_device", "parallel_world"]

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def local_device(choice: str = "auto") -> torch.device:
    """Device of this rank.

    Args:
        choice: ``auto`` (CUDA where there is some), ``cpu`` or ``cuda``.

    Returns:
        The CPU, or the CUDA device that torchrun's ``LOCAL_RANK`` names.

    Raises:
        ConfigError: CUDA is asked for and there is none, or more ranks than devices on this machine.
    """
    num_devices = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and num_devices == 0):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= num_devices:
        raise ConfigError(
            f"run.device={choice}: rank {local_rank} of this machine needs a CUDA device of its own, and there are "
            f"{num_devices}. Start at most as many processes per machine as there are devices, or set run.device=cpu."
        )
    return torch.device("cuda", local_rank)


def is_alone() -> bool:
    """Whether this process was started by itself: there is no world of more than one, and none waits to be joined."""
    return not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") == "1"


def intended_world_size(parallel: ParallelConfig) -> int:
    """Return how many processes the job is meant for: ``parallel.processes``, else the fewest that the layout takes."""
    if parallel.processes is not None:
        return parallel.processes
    dense = parallel.tensor * parallel.pipeline * parallel.context
    return lcm(dense, parallel.expert * parallel.expert_tensor * parallel.pipeline)


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Check that the layout fills the world.

    Raises:
        LayoutError: the number of processes is not the one that the job is meant for, or not a multiple of the product
            of the axes.
    """
    if parallel.processes not in (None, world_size):
        raise LayoutError(
            f"parallel.processes={parallel.processes}, but the world has {world_size}: start {parallel.processes} "
            "processes (torchrun --nproc-per-node), or set parallel.processes to the number you start, or to null."
        )
    axes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    _check_multiple(axes, world_size)
    experts = {"expert_tensor": parallel.expert_tensor, "expert": parallel.expert, "pipeline": parallel.pipeline}
    if parallel.expert > 1 or parallel.expert_tensor > 1:
        _check_multiple(experts, world_size)


def _check_multiple(axes: dict[str, int], world_size: int) -> None:
    product = 1
    for degree in axes.values():
        product *= degree
    if world_size % product:
        factors = " x ".join(f"parallel.{axis}={degree}" for axis, degree in axes.items())
        below = world_size // product * product
        would_do = f"{below} or {below + product}" if below else f"{product}"
        raise LayoutError(
            f"{world_size} processes do not fit the layout {factors} = {product}: expected a multiple of {product}. "
            f"Start {would_do} processes (torchrun --nproc-per-node), or change the layout; "
            "ranks beyond one copy of the model are data-parallel."
        )


@contextmanager
def parallel_world(
    parallel: ParallelConfig,
    device: torch.device,
    timeout: timedelta,
    stop: Callable[[], signal.Signals | None] = lambda: None,
) -> Iterator[None]:
    """Join the ranks of this run, with Megatron's process groups, for the time of the context.

    Uses torch.distributed as it is where it is initialised already; otherwise joins the world that torchrun describes,
    or makes a world of one. Without CUDA, `cpu_stand_in` holds inside. Collective over all ranks.

    Args:
        parallel: Degrees of the axes.
        device: Device of this rank.
        timeout: How long a rank waits for the others.
        stop: Returns the signal that asked this process to stop, if one did; looked at while ranks join.

    Raises:
        RankFailure: not all ranks came in time.
        Preempted: a signal came to one of the ranks before all were there.
        LayoutError: the world does not fit the layout (on rank 0; `RankFailure` on the others), or Megatron's groups
            exist already.
    """
    if parallel_state.model_parallel_is_initialized():
        raise LayoutError(
            "Megatron's parallel groups exist already in this process: leave the other parallel_world first, "
            "or use megascore.attach on the model that was built in it."
        )
    with nullcontext() if device.type == "cuda" else cpu_stand_in(device), _distributed(device, timeout, stop):
        _check_world(parallel)
        try:
            _make_groups(parallel, timeout)
            _seed(device)
            yield
        finally:
            parallel_state.destroy_model_parallel()


@contextmanager
def _distributed(
    device: torch.device, timeout: timedelta, stop: Callable[[], signal.Signals | None] = lambda: None
) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        store, rank, world_size = store_of_environment(timeout, stop)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
    except BaseException as error:
        # NCCL waits for the collectives under way, and one that other ranks never join has no end: there the end of the
        # process breaks them off. All ranks stop together for a signal.
        if backend == "gloo" or world_size == 1 or isinstance(error, Preempted):
            leave_world()
        raise
    leave_world()


def _check_world(parallel: ParallelConfig) -> None:
    if dist.get_backend() == "fake":
        # A pretended world, in which nobody else can agree.
        check_world_size(parallel, dist.get_world_size())
    else:
        agree("checking the layout", lambda: check_world_size(parallel, dist.get_world_size()))


def _make_groups(parallel: ParallelConfig, timeout: timedelta) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
        create_gloo_process_groups=False,
    )


def _seed(device: torch.device) -> None:
    """Megatron's layers ask for its random states even where nothing is random."""
    torch.manual_seed(0)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
