"""Traffic between ranks: number and bytes of collectives, on 2 and 8 real ranks and on 1024 pretended ones."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megascore
from megascore.config import ParallelConfig
from megascore.runs.scoring_run import ScoringRun
from tests.mcore.oracle import all_scores
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

CPU = torch.device("cpu")
SEQUENCE_LENGTH, NUM_LAYERS = 32, SIZES["num_hidden_layers"]

Traffic = tuple[int, int]
"""Collectives and the bytes of their tensors on this rank."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("traffic") / "llama", "llama"))


def measure(function: Callable[[], Any]) -> Traffic:
    """Run a function and see what it gives to torch.distributed; control messages (objects) are not counted."""
    calls: list[int] = []

    def watch(name: str) -> Any:
        original = getattr(dist, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            calls.append(sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor)))
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, watching)

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
    patches = [watch(name) for name in names]
    for patch in patches:
        patch.start()
    try:
        # The world is asked for its objects with all_gather underneath.
        with mock.patch(
            "megascore.parallel.comm.gather_objects", lambda own, group=None: [own] * dist.get_world_size()
        ):
            function()
    finally:
        for patch in patches:
            patch.stop()
    return len(calls), sum(calls)


def score_and_measure(
    checkpoint: str,
    parallel: ParallelConfig,
    scores: list[dict[str, Any]],
    finish: Callable[[ScoringRun], object] = ScoringRun.finish,
) -> dict[str, Traffic]:
    """Traffic of a plain forward pass, and of forward pass, step and finish of a scoring run."""
    from megascore.mcore.models.gpt import build_gpt
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world
    from megascore.weights.huggingface.config import read_config

    tokens = torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.int64)
    with parallel_world(parallel, CPU, timedelta(seconds=60)):
        chunks = build_gpt(read_config(checkpoint).architecture, parallel, torch.float32, CPU, SEQUENCE_LENGTH)
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        traffic = {"plain forward": measure(lambda: forward_only(chunks, [tokens], compute_loss=False))}
        with megascore.attach(chunks, scores=scores) as run:
            traffic["forward"] = measure(lambda: forward_only(chunks, [tokens], compute_loss=False))
            traffic["step"] = measure(run.step)
        traffic["finish"] = measure(lambda: finish(run))
        traffic["hooks"] = (len(run.sites), 0)
    return traffic


ADDITIVE = [entry for entry in all_scores(1) if "iterations" not in entry]


@pytest.mark.parametrize("world_size", [2, 8])
def test_additive_scores_send_vectors_once(world_size: int, world: WorkerPool, checkpoint: str) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    for traffic in world.run(world_size, score_and_measure, checkpoint, parallel, ADDITIVE):
        assert traffic["forward"] == traffic["plain forward"]
        # One tensor-parallel group splits the sequence of the norms' samples; data-parallel ranks wait for the end.
        num_norms, float64 = 2 * NUM_LAYERS + 1, 8
        # Beside them a number goes over the world: whether all is finite.
        assert traffic["step"] == (2, (num_norms * (SIZES["hidden_size"] + 1) + 1) * float64)
        # All statistics, then all scores, each of all data and of 8 groups: the bytes depend on the model alone.
        assert traffic["finish"][0] == 2
        assert traffic["finish"][1] < (1 + 8) * 3 * float64 * NUM_LAYERS * (
            3 * SIZES["intermediate_size"] + 8 * SIZES["hidden_size"]
        )


def test_the_number_of_collectives_does_not_grow_with_the_hooks(world: WorkerPool, checkpoint: str) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    few = world.run(4, score_and_measure, checkpoint, parallel, [{"target": "hidden_size"}])[0]
    many = world.run(4, score_and_measure, checkpoint, parallel, all_scores(1))[0]
    assert few["hooks"][0] < many["hooks"][0]
    assert (few["step"][0], few["finish"][0]) == (2, 2)
    # The iterative score agrees over the data-parallel axis as well, and `finish` asks whether anything still waits.
    assert (many["step"][0], many["finish"][0]) == (3, 4)


def test_a_world_of_1024_ranks_sends_no_more_than_one_of_8(world: WorkerPool, checkpoint: str) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, pipeline=4, context=2)
    pretended = world.run(1, pretend_ranks, checkpoint, parallel, 1024)[0]
    small = world.run(1, pretend_ranks, checkpoint, parallel, 16)[0]
    assert pretended == small
    assert pretended["forward"] == pretended["plain forward"]
    # The axes that split the sequence of a sample: tensor (with sequence parallelism) and context; and
    # whether all is finite.
    assert pretended["step"][0] == 3


def pretend_ranks(checkpoint: str, parallel: ParallelConfig, world_size: int) -> dict[str, Traffic]:
    """Be rank 0 of a large world whose other ranks are made up by PyTorch's fake backend: no results, only traffic."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    own_objects = mock.patch("megascore.parallel.merge.gather_objects", lambda own, group=None: [own])
    agreed = mock.patch("megascore.parallel.comm.gather_objects", lambda own, group=None: [own])
    # What no rank sends must not be taken for NaN of the model.
    nothing_sent = mock.patch("torch.empty", torch.zeros)
    with own_objects, agreed, nothing_sent:
        # The first of 4 stages: the other layers are missing in the world, so there is no whole score file.
        return score_and_measure(checkpoint, parallel, ADDITIVE, ScoringRun.results)
