"""Joining and leaving the parallel world. Tier: gloo processes."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megascore.config import ParallelConfig
from megascore.errors import ConfigError, LayoutError, Preempted
from megascore.mcore.world import parallel_world as world_of_ranks
from megascore.mcore.world.parallel_world import check_world_size, local_device, parallel_world
from tests.pool import RankErrors, WorkerPool

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)


def places(parallel: ParallelConfig) -> tuple[int, int, int]:
    """This rank's place on the tensor, pipeline and data axes."""
    with parallel_world(parallel, CPU, TIMEOUT):
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        )
    assert not parallel_state.model_parallel_is_initialized()
    assert dist.is_initialized()  # It was there before; it is not this context's to end.
    return place


def test_ranks_left_over_by_the_layout_are_data_parallel(world: WorkerPool) -> None:
    assert world.run(2, places, ParallelConfig()) == [(0, 0, 0), (0, 0, 1)]
    assert world.run(2, places, ParallelConfig(tensor=2)) == [(0, 0, 0), (1, 0, 0)]
    assert world.run(2, places, ParallelConfig(pipeline=2)) == [(0, 0, 0), (0, 1, 0)]


def test_a_world_that_does_not_fit_is_refused_on_every_rank(world: WorkerPool) -> None:
    message = (
        r"rank 0: LayoutError: 2 processes do not fit.*(?s:.)*rank 1: RankFailure|rank 1: RankF(?s:.)*rank 0: Layout"
    )
    with pytest.raises(RankErrors, match=message):
        world.run(2, places, ParallelConfig(tensor=3))


def test_the_error_names_the_factors_the_world_and_what_would_do() -> None:
    with pytest.raises(
        LayoutError,
        match=r"^4 processes do not fit the layout parallel.tensor=3 x parallel.pipeline=1 x parallel.context=1 = 3.*"
        r"Start 3 or 6 processes",
    ):
        check_world_size(ParallelConfig(tensor=3), 4)
    with pytest.raises(LayoutError, match=r"Start 4 processes"):
        check_world_size(ParallelConfig(tensor=2, pipeline=2), 2)
    with pytest.raises(LayoutError, match=r"parallel.expert_tensor=1 x parallel.expert=4 x parallel.pipeline=1 = 4"):
        check_world_size(ParallelConfig(expert=4), 6)
    check_world_size(ParallelConfig(tensor=2, pipeline=2), 8)


def test_one_process_needs_no_launcher_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        assert dist.get_world_size() == 1
        with (
            pytest.raises(LayoutError, match="exist already in this process"),
            parallel_world(ParallelConfig(), CPU, TIMEOUT),
        ):
            pass
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


@pytest.mark.parametrize(
    ("device", "world_size", "error", "destroyed"),
    [
        ("cuda:0", 2, None, True),
        ("cuda:0", 2, LayoutError("not here"), False),
        ("cuda:0", 2, KeyboardInterrupt(), False),
        # All ranks stop together.
        ("cuda:0", 2, Preempted("stopped by SIGTERM"), True),
        ("cuda:0", 1, LayoutError("not here"), True),
        ("cpu", 2, LayoutError("not here"), True),
    ],
)
def test_a_failing_rank_does_not_wait_for_what_others_never_join(
    device: str, world_size: int, error: BaseException | None, destroyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in world_of_ranks.TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(world_of_ranks, "store_of_environment", lambda *_: (dist.HashStore(), 0, world_size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with (
        nullcontext() if error is None else pytest.raises(type(error)),
        world_of_ranks._distributed(torch.device(device), TIMEOUT),
    ):
        if error is not None:
            raise error
    assert calls == ["nccl" if device != "cpu" else "gloo", *(["destroyed"] if destroyed else [])]


def test_a_rank_without_a_cuda_device_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("auto") == torch.device("cuda", 1)
    assert local_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"rank 2 of this machine.*there are 2"):
        local_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_device("auto") == CPU
