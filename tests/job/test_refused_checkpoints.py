"""Checkpoints that a run refuses: it names every difference, changes nothing, and never starts afresh by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megascore.resume.progress_file import RunState, read_status
from tests.job.resumable import SCORES, Job, assert_same_scores, copy_of, make_job, run_and_stop_on_rank, run_on_rank
from tests.models import save_checkpoint, tensors_of
from tests.pool import WorkerPool


@pytest.fixture(scope="module")
def stopped_job(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make_job(tmp_path_factory.mktemp("stopped") / "run", model_root)
    assert "Preempted" in world.run(1, run_and_stop_on_rank, job, 2)[0]
    return job


@pytest.fixture
def stopped(stopped_job: Job, model_root: Path, tmp_path: Path) -> Job:
    return copy_of(stopped_job, tmp_path / "run", model_root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "seed": (["run.seed=7"], ["run.seed is 0 there, 7 here", "data.fingerprint is"]),
    "type": (["model.dtype=float32"], ["model.dtype is 'float64' there, 'float32' here"]),
    "samples": (
        ["data.num_samples=20", "run.steps=5", f"scores={SCORES.replace('iterations: 6', 'iterations: 5')}"],
        [
            "data.num_samples is 24 there, 20 here",
            "data.fingerprint is",
            "run.steps is 6 there, 5 here",
            "scores[4].iterations is 6 there, 5 here",
        ],
    ),
    "loss": (["run.loss=false"], ["run.loss is True there, False here"]),
    "a score less": (["scores=[{target: ffn}]"], ["scores[1].target is 'kv_heads' there, 'not given' here"]),
    "other scores": (
        ["scores=[{target: ffn, method: independent_contribution}]"],
        ["scores[0].method is 'l2_norm' there, 'independent_contribution' here"],
    ),
    "sequence length": (
        ["data.sequence_length=8", "run.global_batch_size=8"],
        ["data.sequence_length is 16 there, 8 here", "run.global_batch_size is 4 there, 8 here"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_runs_checkpoint_is_refused_with_every_difference(change: str, stopped: Job, world: WorkerPool) -> None:
    overrides, differences = CHANGES[change]
    before = contents(stopped.checkpoints)
    told = world.run(1, run_on_rank, stopped, overrides)[0]
    assert "CheckpointError" in told
    assert "is another run's" in told
    for difference in differences:
        assert difference in told
    assert contents(stopped.checkpoints) == before
    assert not stopped.output.exists()


def test_other_weights_are_refused(stopped: Job, tmp_path: Path, model_root: Path, world: WorkerPool) -> None:
    other = save_checkpoint(tmp_path / "other", "llama", num_key_value_heads=4, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_root / "llama" / name, other)
    told = world.run(1, run_on_rank, stopped, [f"model.hf={other}"])[0]
    assert "model.weights_fingerprint is" in told


def test_a_moved_model_and_text_are_the_same_run(
    stopped: Job, tmp_path: Path, model_root: Path, world: WorkerPool
) -> None:
    shutil.copytree(model_root, tmp_path / "moved")
    moved = [f"model.hf={tmp_path / 'moved' / 'llama'}", f"data.text={tmp_path / 'moved' / 'words.txt'}"]
    assert "going on from" in world.run(1, run_on_rank, stopped, moved)[0]
    assert stopped.output.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def drop_a_hook(path: Path) -> None:
    """Take one hook's state out, and sign the file anew: it is whole, but not of this run."""
    from megascore.resume.snapshot import Snapshot

    whole = Snapshot.from_bytes(path.read_bytes())
    states = {key: state for key, state in whole.states.items() if "layers.1" not in key or "kv_heads" not in key}
    assert len(states) == len(whole.states) - 1
    path.write_bytes(Snapshot(whole.cursor, whole.identity, states, whole.sums).to_bytes())


def change_weight_norms(path: Path) -> None:
    from megascore.resume.snapshot import Snapshot

    whole = Snapshot.from_bytes(path.read_bytes())
    for key, state in whole.states.items():
        if "layers.2" in key and "independent" in key:
            state["weight_norm"][2] *= 1.01
    path.write_bytes(whole.to_bytes())


def rename_tensors(path: Path) -> None:
    save_file({f"other.{name}": tensor for name, tensor in tensors_of(path).items()}, path)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "is whole (megascore-step-00000003.safetensors can't be read"),
    "foreign": (rename_tensors, "is a safetensors file, but no checkpoint of a run"),
    "a hook without state": (
        drop_a_hook,
        "decoder.layers.1.self_attention.linear_proj/kv_heads/independent_contribution has",
    ),
    "other weight norms": (change_weight_norms, "weights differ in 1 of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_damage_is_refused_on_all_ranks_and_nothing_changes(
    damage: str, world_size: int, stopped: Job, world: WorkerPool
) -> None:
    function, words = DAMAGES[damage]
    for path in stopped.checkpoints.glob("megascore-step-*"):
        function(path)
    before = contents(stopped.checkpoints)
    told = world.run(world_size, run_on_rank, stopped, [f"parallel.tensor={world_size}"])
    assert all(words in text for text in told)
    assert all("Error: " in text or "RankFailure: " in text for text in told)
    assert contents(stopped.checkpoints) == before


def test_a_damaged_newest_one_gives_way_and_the_scores_are_the_same(
    stopped: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    truncate(stopped.checkpoints / "megascore-step-00000003.safetensors")
    told = world.run(1, run_on_rank, stopped)[0]
    assert "damaged checkpoint left out: megascore-step-00000003.safetensors" in told
    assert "megascore-step-00000002.safetensors, step 2" in told
    undisturbed = make_job(tmp_path / "undisturbed", model_root)
    world.run(1, run_on_rank, undisturbed)
    assert_same_scores(stopped.scores(), undisturbed.scores(), 1e-12)


def test_checkpoints_that_were_removed_are_missed(stopped: Job, world: WorkerPool) -> None:
    for path in stopped.checkpoints.glob("megascore-step-*"):
        path.unlink()
    told = world.run(1, run_on_rank, stopped)[0]
    assert "has no checkpoint, but its progress.json tells of megascore-step-00000003.safetensors" in told
    assert not stopped.output.exists()


def test_starting_afresh_is_asked_for(stopped: Job, world: WorkerPool) -> None:
    told = world.run(1, run_on_rank, stopped, ["run.resume=never", "run.seed=3"])[0]
    assert "going on from" not in told
    assert stopped.scores().metadata["data"]["seed"] == 3
    # And asked for again, also where the same process has done it before.
    stopped.output.unlink()
    told = world.run(1, run_on_rank, stopped, ["run.resume=never", "run.seed=3"])[0]
    assert "dropped" in told
    assert "going on from" not in told


def test_a_finished_run_says_so_and_leaves_its_result_alone(stopped: Job, world: WorkerPool) -> None:
    world.run(1, run_on_rank, stopped)
    before, status = stopped.output.read_bytes(), (stopped.checkpoints / "progress.json").read_bytes()
    for overrides in ((), ("run.overwrite=true",), ("run.micro_batch_size=2",)):
        assert "holds the finished scores of this run" in world.run(2, run_on_rank, stopped, overrides)[0]
    assert stopped.output.read_bytes() == before
    assert (stopped.checkpoints / "progress.json").read_bytes() == status
    assert read_status(stopped.checkpoints)["state"] == RunState.FINISHED.value


def test_a_run_killed_just_before_it_would_say_finished_says_so_when_it_is_started_again(
    stopped: Job, world: WorkerPool
) -> None:
    world.run(1, run_on_rank, stopped)
    progress = stopped.checkpoints / "progress.json"
    progress.write_text(progress.read_text().replace('"finished"', '"running"'))
    assert read_status(stopped.checkpoints)["state"] == RunState.INTERRUPTED.value
    assert "holds the finished scores" in world.run(2, run_on_rank, stopped)[0]
    assert read_status(stopped.checkpoints)["state"] == RunState.FINISHED.value


def test_another_architecture_with_the_same_weights_is_refused(
    stopped: Job, tmp_path: Path, model_root: Path, world: WorkerPool
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_root / "llama", other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 3e-5
    (other / "config.json").write_text(json.dumps(config))
    told = world.run(1, run_on_rank, stopped, [f"model.hf={other}"])[0]
    assert "model.architecture" in told
    assert "3e-05 here" in told


def test_starting_afresh_goes_on_after_a_death_while_loading(stopped: Job, world: WorkerPool) -> None:
    """What was dropped is not missed by the next start."""
    from megascore.resume.folder import RunFolder

    with RunFolder(stopped.checkpoints) as folder:
        folder.start_afresh("a launch that died", is_restart=False)
    told = world.run(1, run_on_rank, stopped)[0]
    assert "no checkpoint in" in told
    assert "starting from the beginning" in told
    assert stopped.output.exists()


def test_a_finished_result_of_another_run_is_not_taken_for_this_ones(stopped: Job, world: WorkerPool) -> None:
    world.run(1, run_on_rank, stopped)
    told = world.run(1, run_on_rank, stopped, ["run.seed=5", f"run.checkpoint_dir={stopped.folder / 'second'}"])[0]
    assert "ScoreFileError" in told
    assert "exists already" in told


def test_a_result_that_was_lost_is_made_again_from_the_last_checkpoint(stopped: Job, world: WorkerPool) -> None:
    world.run(1, run_on_rank, stopped)
    first = stopped.scores()
    stopped.output.unlink()
    assert "step 6" in world.run(1, run_on_rank, stopped)[0]
    assert_same_scores(stopped.scores(), first, 1e-14)


def test_progress_tells_a_watcher_everything(stopped: Job) -> None:
    status = json.loads((stopped.checkpoints / "progress.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("stopped", 3, 6)
    assert status["tokens"] == 3 * 4 * 16
    assert status["last_checkpoint"]["step"] == 3
    assert status["last_checkpoint"]["seconds"] >= 0
    assert status["eta_seconds"] > 0
