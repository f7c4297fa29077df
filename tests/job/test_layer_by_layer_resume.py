"""A job that runs one layer at a time goes on from the layer where it was stopped or killed, on any layout."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascore.resume.folder import RunFolder
from megascore.resume.progress_file import RunState, read_status
from megascore.resume.snapshot import Snapshot
from megascore.runs.steps import Cursor
from tests.job.resumable import Job, assert_same_scores, copy_of, make_job, run_on_rank
from tests.pool import WorkerPool
from tests.ranks import RankProcesses

BLOCKWISE = "run.blockwise=true"
NUM_LAYERS = 4
NUM_KILLS = 4
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order, divided by small scores."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP 2 and SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "DP 2": (2, ()),
}


@pytest.fixture(scope="module")
def stopped(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    """A run at TP=2, stopped when one layer was done."""
    job = make_job(tmp_path_factory.mktemp("stopped") / "run", model_root)
    told = world.run(2, stop_on_rank, job, 1, 0, LAYOUTS["TP 2 and SP"][1], 1)
    assert all("Preempted: stopped by SIGTERM after block 1" in text for text in told), told
    return job


def stop_on_rank(job: Job, block: int, step: int, overrides: tuple[str, ...] = (), rank: int = 0) -> str:
    """Run with a signal to one rank when so many blocks and steps are done."""
    import torch.distributed as dist

    def send_signal(cursor: Cursor) -> None:
        if (cursor.block, cursor.step) == (block, step) and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return run_on_rank(job, (BLOCKWISE, *overrides), send_signal)


@pytest.mark.parametrize("layout", ["one process", "PP 2", "DP 2"])
def test_a_run_that_was_stopped_after_a_layer_goes_on_in_another_layout(
    layout: str, stopped: Job, undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = copy_of(stopped, tmp_path / "run", model_root)
    world_size, overrides = LAYOUTS[layout]
    shown = world.run(world_size, run_on_rank, job, (BLOCKWISE, *overrides))
    assert "megascore-step-00000000-block-0001.safetensors, block 1" in shown[0]
    # What was done is not scored again: each layer that was left and what follows them save once more.
    assert shown[0].count("checkpoint of block") == NUM_LAYERS
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_a_run_goes_on_from_every_block_and_from_the_midst_of_one(
    undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    # Nothing is done at first, and at the end everything but the loss.
    for block, step, layout in ((0, 2, "PP 2"), (1, 3, "TP 2 and SP"), (2, 0, "PP 2"), (4, 5, "TP 2 and SP")):
        world_size, overrides = LAYOUTS[layout]
        told = world.run(world_size, stop_on_rank, job, block, step, overrides)
        where = f"after block {block};" if block else "before anything was done;"
        assert f"Preempted: stopped by SIGTERM {where}" in told[0], told
        status = read_status(job.checkpoints)
        assert (status["state"], status["block"], status["step"]) == (RunState.STOPPED.value, block, step)
        assert status["total_blocks"] == NUM_LAYERS
    world.run(1, run_on_rank, job, (BLOCKWISE,))
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_a_run_that_only_lacks_its_result_writes_it(
    undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make_job(tmp_path / "run", model_root)
    world.run(2, run_on_rank, job, (BLOCKWISE,))
    # Counted as in a full pass, though each layer goes over all of them; and told in the same words.
    status, of_full_pass = read_status(job.checkpoints), read_status(undisturbed.checkpoints)
    assert status["tokens"] == undisturbed.scores().metadata["num_tokens"]
    assert set(status) - set(of_full_pass) == {"block", "total_blocks"}
    assert status["layout"] == of_full_pass["layout"]
    folder = RunFolder(job.checkpoints)
    assert [path.name[-15:] for path in folder.checkpoints()] == ["004.safetensors", "005.safetensors"]
    folder.close()
    job.output.unlink()
    spoilt = copy_of(job, tmp_path / "spoilt", model_root)
    change(spoilt, states=lambda states: states["decoder.final_layernorm/hidden_size/l2_norm"].popitem())
    told = world.run(1, run_on_rank, spoilt, (BLOCKWISE,))
    assert "CheckpointError: the saved results of 5 blocks are not of this run: decoder.final_layernorm" in told[0]
    shown = world.run(1, run_on_rank, job, (BLOCKWISE,))
    assert "checkpoint of block" not in shown[0]
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_checkpoints_of_the_two_ways_to_run_are_kept_apart(
    stopped: Job, undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    told = world.run(1, run_on_rank, copy_of(stopped, tmp_path / "one", model_root))
    assert "CheckpointError" in told[0]
    assert "run.blockwise is True there, False here" in told[0]
    told = world.run(1, run_on_rank, copy_of(undisturbed, tmp_path / "two", model_root), (BLOCKWISE,))
    assert "run.blockwise is False there, True here" in told[0]


def change(job: Job, **changes: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite parts of a job's newest checkpoint, by their names; it is whole, and has a right checksum."""
    path = max(job.checkpoints.glob("*.safetensors"))
    snapshot = Snapshot.from_bytes(path.read_bytes())
    parts = {name: dict(getattr(snapshot, name)) for name in changes}
    for name, function in changes.items():
        function(parts[name])
    path.write_bytes(replace(snapshot, **parts).to_bytes())


def test_a_done_layer_is_believed_only_if_it_has_what_the_model_declares(
    stopped: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    fc2, block = "decoder.layers.0.mlp.linear_fc2/ffn", "decoder.layers.0/layers/block_similarity"

    def spoil_states(states: dict[str, Any]) -> None:
        # Two scores share a hook.
        l2_norm = states[f"{fc2}/moments"]
        l2_norm["sum_of_squared_means"] = l2_norm["sum_of_squared_means"][:-1]
        l2_norm["num_calls"] = l2_norm["num_calls"].double()
        l2_norm["num_heads"] = l2_norm.pop("num_tokens")
        states["decoder.layers.1/layers/block_similarity"] = states.pop(block)

    def spoil_scores(sums: dict[str, Any]) -> None:
        sums[f"score/{fc2}/l2_norm"] = sums[f"score/{fc2}/l2_norm"].float()[:3]
        del sums[f"score/{block}"]

    job = copy_of(stopped, tmp_path / "run", model_root)
    change(job, states=spoil_states, sums=spoil_scores)
    told = world.run(2, run_on_rank, job, (BLOCKWISE, *LAYOUTS["PP 2"][1]))
    assert "CheckpointError: the saved results of 1 blocks are not of this run: " in told[0]
    for difference in (
        f"{block} has no saved state",
        "decoder.layers.1/layers/block_similarity has a saved state, but is in none of these blocks",
        f"{fc2}/moments: 'num_tokens' is missing",
        f"{fc2}/moments: 'num_heads' is there, but not kept here",
        f"{fc2}/moments: 'sum_of_squared_means' has shape [95] there, [96] here",
        f"{fc2}/moments: 'num_calls' is float64 there, int64 here",
        f"{block} has no saved score",
        f"{fc2}/l2_norm: 'score' has shape [3] there, [96] here",
        f"{fc2}/l2_norm: 'score' is float32 there, float64 here",
    ):
        assert f" {difference};" in told[0].replace(". Go on", ";"), difference
    assert told[0].count(";") == 8
    assert "RankFailure: comparing the layers that are done failed on rank 0" in told[1]
    assert not job.output.exists()

    job = copy_of(stopped, tmp_path / "another", model_root)
    change(job, cursor=lambda cursor: cursor.update(block=6))
    told = world.run(1, run_on_rank, job, (BLOCKWISE,))
    assert "CheckpointError: the checkpoint tells of 6 blocks that are done, and this model has 4 layers" in told[0]


def test_checkpoints_come_as_often_as_was_asked_for(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    job = make_job(tmp_path / "run", model_root)
    # 6 steps a block: the tenth step is in the second block, the twentieth in the fourth, the thirtieth in the last.
    shown = world.run(1, run_on_rank, job, (BLOCKWISE, "run.checkpoint_interval=10"))[0]
    assert [block for block in range(6) if f"checkpoint of block {block}:" in shown] == [2, 4, 5]


def test_kills_at_random_moments_change_nothing(undisturbed: Job, model_root: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"

    def start(job: Job) -> RankProcesses:
        overrides = [BLOCKWISE, f"run.spool_dir={spool}", *LAYOUTS["PP 2"][1]]
        return RankProcesses(2, ["score", str(job.config), *overrides], job.folder / "log.txt")

    # The first start also imports everything.
    assert start(make_job(tmp_path / "first", model_root)).wait() == [0, 0]
    started = time.monotonic()
    assert start(make_job(tmp_path / "timed", model_root)).wait() == [0, 0]
    whole_run = time.monotonic() - started
    moments = random.Random(0)
    num_kills = num_runs = num_resumed = 0
    while num_kills < NUM_KILLS:
        num_runs += 1
        job = make_job(tmp_path / f"run{num_runs}", model_root)
        log, codes = job.folder / "log.txt", None
        while codes != [0, 0]:
            ranks = start(job)
            time.sleep(whole_run * moments.uniform(0.4, 1.0))
            ranks.kill(moments.choice([[0], [1], [0, 1]]) if num_kills < NUM_KILLS else [])
            codes = ranks.wait()
            killed = -signal.SIGKILL in codes
            num_kills += killed
            assert killed or codes == [0, 0], (codes, log.read_text())
        num_resumed += log.read_text().count("going on from")
        # Those of killed ranks are gone, too.
        assert list(spool.iterdir()) == []
        assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)
    assert num_resumed, "some kills should hit a run that has saved something"
