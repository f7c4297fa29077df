"""The few collectives there are. Each works without torch.distributed too: one process is a world of one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megascore.errors import MegascoreError, RankFailure

__all__ = [
    "agree",
    "broadcast_object",
    "broadcast_tensor",
    "collective_device",
    "gather_objects",
    "leave_world",
    "max_over_world",
    "sum_in_place",
    "world_rank",
    "world_size",
]

PIECE_BYTES = 1 << 26
"""Memory of a device that a broadcast takes at most."""

SECONDS_TO_FREE = 0.02
"""Long beside what freeing a few tensors takes, short beside all else at the end of a run."""

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_rank() -> int:
    """Return this process's number; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave_world() -> None:
    """Take the process groups of torch.distributed apart. Every rank does it, in its own time.

    Gloo's threads free the tensors of the last collective, and need Python's lock for that. A group that waits for
    its threads while it holds that lock waits for ever (seen with torch 2.6; newer ones have not been seen to, and have
    not been proven not to): a moment without the lock lets them finish.
    """
    time.sleep(SECONDS_TO_FREE)
    dist.destroy_process_group()


def sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Add each tensor over the ranks of ``group``, in one collective however many tensors there are.

    Collective over ``group`` (None: the world). All ranks bring tensors of the same shapes in the same order.
    Summed in float64, which holds int64 counts exactly up to 2**53. Tensors may be on any device.
    """
    if not tensors or world_size() == 1:
        return
    device = tensors[0].device
    if device.type == "cpu":
        # A part of a model that waits in host memory, in a world that talks over NCCL.
        device = collective_device(group)
    flat = torch.cat([tensor.reshape(-1).to(device, torch.float64) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view(tensor.shape))


def gather_objects(own: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's object, in rank order, on every rank.

    Collective over ``group`` (None: the world). The objects are this program's own, never a user's file.
    """
    if world_size() == 1:
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def max_over_world(values: Sequence[int]) -> list[int]:
    """Return the largest of each value over all ranks. Collective over the world: one small all-reduce."""
    if world_size() == 1:
        return list(values)
    on_device = torch.tensor(values, dtype=torch.int64, device=collective_device())
    dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
    return [int(value) for value in on_device.tolist()]


def broadcast_object(own: Result) -> Result:
    """Return rank 0's object on every rank. Collective over the world; the objects are this program's own."""
    if world_size() == 1:
        return own
    box = [own if world_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def broadcast_tensor(own: Tensor | None) -> Tensor:
    """Return rank 0's tensor, which is in host memory, on every rank, in host memory too.

    Collective over the world; other ranks bring None. It goes in pieces, so that a device need not hold all of it.
    """
    like = broadcast_object(None if own is None else own.to("meta"))
    assert like is not None
    whole = (
        torch.empty_like(like, device="cpu", memory_format=torch.contiguous_format) if own is None else own.contiguous()
    )
    if world_size() == 1:
        return whole
    device = collective_device()
    for piece in torch.split(whole.view(-1), max(1, PIECE_BYTES // whole.itemsize)):
        sent = piece.to(device)
        dist.broadcast(sent, src=0)
        piece.copy_(sent)
    return whole


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return where the tensors of a collective over ``group`` (None: the world) must be: NCCL knows no host memory."""
    if world_size() == 1 or not _has_only_nccl(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _has_only_nccl(group: dist.ProcessGroup | None) -> bool:
    # "nccl", "cuda:nccl", or "cpu:gloo,cuda:nccl", whose tensors may be anywhere.
    backend = str(dist.get_backend(group))
    return "nccl" in backend and "gloo" not in backend


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: str | None = None
    trace: str = ""


def agree(what: str, function: Callable[[], Result]) -> Result:
    """Run a function on every rank, and fail on all of them if it fails on any.

    Collective over the world. Where ``function`` is collective itself, a rank that fails in it before the others may
    leave them waiting until the timeout: check first what can fail.

    Args:
        what: The thing tried, for the error: "reading the checkpoint".
        function: Runs on every rank.

    Returns:
        The function's value on this rank.

    Raises:
        Exception: the function's own error, on the first rank that failed, so that it is told once.
        RankFailure: on all other ranks, with rank and error of the first that failed. Where a rank has failed with the
            same error of megascore's, the failure is marked: the command line repeats nothing, and its exit code is the
            same.
    """
    error: Exception | None = None
    value: Result | None = None
    try:
        value = function()
    except Exception as caught:  # It is a value here: told to all ranks, then raised again below.
        error = caught
    outcomes = gather_objects(_outcome_of(error))
    for rank, outcome in enumerate(outcomes):
        if outcome.error is None:
            continue
        if error is not None and rank == world_rank():
            raise error
        failure = RankFailure(f"{what} failed on rank {rank}: {outcome.error}{outcome.trace}")
        # Found by several ranks alike, such as a layout that does not fit: the first one's word is enough.
        failure.is_told = failure.is_own = isinstance(error, MegascoreError) and str(error) == outcome.error
        raise failure
    return value  # type: ignore[return-value]


def _outcome_of(error: Exception | None) -> _Outcome:
    if error is None:
        return _Outcome()
    if isinstance(error, MegascoreError):
        return _Outcome(error=str(error))
    trace = "".join(traceback.format_exception(error))
    return _Outcome(error=f"{type(error).__name__}: {error}", trace=f"\n--- its traceback ---\n{trace}")
