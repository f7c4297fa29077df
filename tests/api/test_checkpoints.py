"""Checkpoints in a loop of one's own: stop and go on, on the same and on another number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

import megascore
from megascore.errors import ConfigError, MegascoreError
from megascore.resume.snapshot import Snapshot
from megascore.versions import installed_versions
from tests.models import SIZES, load_with_transformers, save_checkpoint
from tests.pool import WorkerPool

NUM_STEPS, BATCH_SIZE = 4, 4
SCORES: list[dict[str, Any]] = [
    {"target": "ffn"},
    {"target": "ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
    {"target": "layers"},
    {"target": "hidden_size", "method": "layer_norm_contribution"},
]
IDENTITY = {"data": "seed 0", "weights": "random"}
TOLERANCE = 1e-12
"""float64, the same samples: only the order of additions differs."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("saver") / "llama", "llama"))


def load(model_folder: str) -> nn.Module:
    return load_with_transformers(model_folder, torch.float64)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, SIZES["vocab_size"], (BATCH_SIZE, 16), generator=generator) for _ in range(NUM_STEPS)]


def score(
    model_folder: str,
    folder: str,
    *,
    signal_after: int | None = None,
    scores: list[dict[str, Any]] = SCORES,
    **options: Any,
) -> dict[str, Tensor] | str:
    """Run the loop of `megascore.checkpoints`; return the scores, or the text of a user's error."""
    in_world = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if in_world else (0, 1)
    settings = {"total_steps": NUM_STEPS, "identity": IDENTITY, "interval": 1, **options}
    try:
        with (
            megascore.attach(load(model_folder), scores=scores) as run,
            megascore.checkpoints(run, folder, **settings) as saver,
            torch.no_grad(),
        ):
            for batch in batches()[saver.step :]:
                run.view.modules[0](batch[rank::size])
                run.step()
                if run.num_steps == signal_after and rank == size - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                saver.after_step()
            assert saver.step == NUM_STEPS
            result = run.finish()
            saver.finish()
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"
    return dict(result)


def assert_same(scores: dict[str, Tensor] | str, expected: dict[str, Tensor]) -> None:
    assert isinstance(scores, dict), scores
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        torch.testing.assert_close(value, expected[key], rtol=TOLERANCE, atol=0)


@pytest.fixture(scope="module")
def expected(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    with megascore.attach(load(model_folder), scores=SCORES) as run, torch.no_grad():
        for batch in batches():
            run.view.modules[0](batch)
            run.step()
    return dict(run.finish())


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "progress.json").read_text()))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    before: int, after: int, world: WorkerPool, model_folder: str, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    for text in world.run(before, score_stopped, model_folder, str(tmp_path)):
        assert text.startswith("Preempted: stopped by SIGUSR1 after step 2; everything is saved")
    assert state_of(tmp_path)["state"] == "stopped"
    assert (state_of(tmp_path)["step"], state_of(tmp_path)["total_steps"]) == (2, NUM_STEPS)
    for scores in world.run(after, score, model_folder, str(tmp_path)):
        assert_same(scores, expected)
    assert state_of(tmp_path)["state"] == "finished"
    assert state_of(tmp_path)["layout"] == {"data": after}


def score_stopped(model_folder: str, folder: str) -> Any:
    return score(model_folder, folder, signal_after=2)


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    model_folder: str, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """By an error in the loop, which takes no further checkpoint."""
    seen = 0
    with (
        pytest.raises(RuntimeError, match="my own"),
        megascore.attach(load(model_folder), scores=SCORES) as run,
        megascore.checkpoints(run, tmp_path, total_steps=NUM_STEPS, identity=IDENTITY, interval=2) as saver,
    ):
        for batch in batches():
            run.view.modules[0](batch)
            run.step()
            saver.after_step()
            seen += 1
            if seen == 3:
                raise RuntimeError("my own")
    assert state_of(tmp_path)["state"] == "interrupted"
    assert sorted(path.name for path in tmp_path.glob("megascore-step-*")) == ["megascore-step-00000002.safetensors"]
    assert_same(score(model_folder, str(tmp_path), interval=None), expected)


def test_a_finished_run_gives_its_scores_again(model_folder: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    assert_same(score(model_folder, str(tmp_path)), expected)
    assert_same(score(model_folder, str(tmp_path)), expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"identity": {"data": "seed 1", "weights": "random"}}, "yours.data is 'seed 0' there, 'seed 1' here"),
        ({"identity": {"weights": "random"}}, "yours.data is 'seed 0' there, 'not given' here"),
        ({"total_steps": 8}, "run.steps is 4 there, 8 here"),
        ({"scores": SCORES[1:]}, "scores[0].method is 'l2_norm' there, 'iterative_contribution' here"),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], told: str, model_folder: str, tmp_path: Path) -> None:
    score(model_folder, str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("megascore-step-*")}
    text = score(model_folder, str(tmp_path), **changes)
    assert isinstance(text, str)
    assert text.startswith("CheckpointError")
    assert told in text
    assert {path.name: path.read_bytes() for path in tmp_path.glob("megascore-step-*")} == before


OLD_IDENTITY = {
    "model.ffn_hidden_size": 96,
    "model.head_dim": 16,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.num_kv_heads": 2,
    "model.num_layers": 4,
    "run.steps": 4,
    "scores[0].method": "l2_norm",
    "scores[0].target": "ffn",
    "scores[1].iterations": 4,
    "scores[1].method": "iterative_contribution",
    "scores[1].target": "ffn",
    "scores[2].method": "block_similarity",
    "scores[2].target": "layers",
    "scores[3].method": "layer_norm_contribution",
    "scores[3].target": "hidden_size",
    "yours.data": "seed 0",
    "yours.weights": "random",
}
"""What version 0.1 wrote for the run of this file, but for its own number."""


def lay_down_as_version_0_1(path: Path, snapshot: Snapshot, version: str | None) -> None:
    """Write a checkpoint with code that stands by itself, so that it keeps the form when the package's own changes."""
    tensors = {f"{site}#{name}": value for site, state in snapshot.states.items() for name, value in state.items()}
    content: dict[str, Any] = {
        "created": "2026-11-26T00:57:13+00:00",
        "cursor": {"step": 2},
        "identity": {**OLD_IDENTITY, "run.megascore": version},
        "schema_version": 1,
        "sites": sorted(snapshot.states),
        "versions": {"megascore": version, "megatron-core": None, "python": "3.11.7", "torch": "2.13.0"},
    }

    def text() -> str:
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    digest = hashlib.sha256(text().encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
    content["sha256"] = digest.hexdigest()
    path.write_bytes(save(tensors, {"megascore_checkpoint": text()}))


@pytest.fixture
def old_folder(model_folder: str, tmp_path: Path) -> Path:
    """Two folders with a checkpoint in the form of version 0.1: one of this version's number, one of another."""
    score(model_folder, str(tmp_path / "new"), signal_after=2)
    snapshot = Snapshot.from_bytes((tmp_path / "new" / "megascore-step-00000002.safetensors").read_bytes())
    folder = tmp_path / "old"
    folder.mkdir()
    for name, version in (("same", installed_versions()["megascore"]), ("other", "0.0.9")):
        (folder / name).mkdir()
        lay_down_as_version_0_1(folder / name / "megascore-step-00000002.safetensors", snapshot, version)
    return folder


def test_a_checkpoint_in_the_form_of_version_0_1_is_gone_on_with(
    model_folder: str, expected: dict[str, Tensor], old_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_same(score(model_folder, str(old_folder / "same")), expected)
    assert "megascore-step-00000002.safetensors, step 2" in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_refused_by_name(model_folder: str, old_folder: Path) -> None:
    text = score(model_folder, str(old_folder / "other"))
    assert f"run.megascore is '0.0.9' there, '{installed_versions()['megascore']}' here. Start" in text


def test_a_run_can_begin_afresh(model_folder: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    score(model_folder, str(tmp_path), signal_after=2, identity={"data": "another"})
    assert_same(score(model_folder, str(tmp_path), resume="never"), expected)


def test_the_folder_is_free_again_when_it_could_not_be_entered(model_folder: str, tmp_path: Path) -> None:
    score(model_folder, str(tmp_path), signal_after=2)
    handler = signal.getsignal(signal.SIGTERM)
    assert "CheckpointError" in score(model_folder, str(tmp_path), identity={})
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "Preempted" not in score(model_folder, str(tmp_path))


def test_wrong_use_is_refused(model_folder: str, tmp_path: Path) -> None:
    with megascore.attach(load(model_folder)) as run:
        for options, told in (
            ({"total_steps": 0}, "total_steps is 0"),
            ({"total_steps": 1, "resume": "maybe"}, "resume is 'maybe': expected one of auto, never"),
        ):
            with pytest.raises(ConfigError, match=told):
                megascore.checkpoints(run, tmp_path, **options)  # type: ignore[arg-type]
        run.step()
        with pytest.raises(ConfigError, match="has done 1 steps: enter megascore.checkpoints before"):
            megascore.checkpoints(run, tmp_path, total_steps=4)
