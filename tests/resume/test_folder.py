"""The folder of checkpoints: killed between any two file operations it holds a whole checkpoint, the old or the new."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megascore.errors import CheckpointError
from megascore.files.tensor_file import decode, encode
from megascore.resume.folder import RunFolder
from megascore.resume.progress_file import is_in_use
from megascore.resume.snapshot import Snapshot

FILE_OPERATIONS = ("open", "fsync", "replace", "unlink", "mkdir", "close", "stat", "ftruncate")


def snapshot(step: int) -> Snapshot:
    states = {"decoder.layers.0.x/ffn/l2_norm": {"sums": torch.full((8,), float(step), dtype=torch.float64)}}
    return Snapshot({"step": step}, {"model": "m"}, states, {"loss": torch.tensor([float(step)])})


def write_steps(path: Path, *steps: int) -> None:
    with RunFolder(path) as folder:
        folder.find(snapshot(0).identity)
        for step in steps:
            folder.write(snapshot(step))


def newest_step(path: Path) -> int:
    with RunFolder(path) as folder:
        found = folder.newest()
    assert found is not None
    assert float(found.snapshot.states["decoder.layers.0.x/ffn/l2_norm"]["sums"][3]) == found.snapshot.step
    return found.snapshot.step


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def write_and_die(path: Path, number: int, step: int) -> None:
    """Write a checkpoint, but be killed before the file operation of this number; runs in a process of its own."""
    count = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted

    import io

    for name in FILE_OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    io.open = dying(io.open)
    write_steps(path, step)


def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    number, finished, seen = 0, False, []
    while not finished:
        path = tmp_path / f"killed{number}"
        write_steps(path, 1, 2)
        process = context.Process(target=write_and_die, args=(path, number, 3))
        process.start()
        process.join()
        finished = process.exitcode == 0
        assert finished or process.exitcode == -signal.SIGKILL
        assert not is_in_use(path)
        seen.append(newest_step(path))
        # What comes next goes on from there, and leaves no rest of the killed one.
        write_steps(path, 4)
        assert newest_step(path) == 4
        assert sorted(name.name for name in path.iterdir()) == sorted(
            ["lock", f"megascore-step-0000000{seen[-1]}.safetensors", "megascore-step-00000004.safetensors"]
        )
        number += 1
    assert len(seen) > 30, "every step of the way should be a place to be killed at"
    assert seen == sorted(seen), "once the new checkpoint is there, it stays"
    assert set(seen) == {2, 3}


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    with RunFolder(tmp_path) as folder:
        names = [path.name for path in folder.checkpoints()]
    assert names == ["megascore-step-00000003.safetensors", "megascore-step-00000004.safetensors"]


def test_a_damaged_newest_gives_way_to_the_one_before_it_and_says_so(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    damage(tmp_path / "megascore-step-00000002.safetensors")
    with RunFolder(tmp_path) as folder:
        found = folder.newest()
        assert found is not None
        assert found.snapshot.step == 1
        assert found.skipped == ("megascore-step-00000002.safetensors doesn't match its own checksum",)
        # The next one takes the damaged one's place, and the good one before it stays.
        assert folder.find(snapshot(0).identity) is not None
        folder.write(snapshot(2))
    assert newest_step(tmp_path) == 2
    assert (tmp_path / "megascore-step-00000001.safetensors").exists()


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_checkpoints_alone_are_refused_and_nothing_changes(length: int, tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    for path in tmp_path.glob("megascore-step-*"):
        path.write_bytes(path.read_bytes()[:length])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("megascore-step-*")}
    folder = RunFolder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole \(megascore-step-00000002.safetensors can't be read"
    ):
        folder.newest()
    folder.close()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("megascore-step-*")} == before


def test_a_foreign_file_is_refused_by_what_it_is(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "megascore-step-00000009.safetensors")
    words = "is a safetensors file, but no checkpoint of a run"
    with RunFolder(tmp_path) as folder, pytest.raises(CheckpointError, match=words):
        folder.newest()


def test_another_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    (path,) = tmp_path.glob("megascore-step-*")
    content, tensors = decode("megascore_checkpoint", path.read_bytes())
    path.write_bytes(encode("megascore_checkpoint", {**content, "schema_version": 0}, tensors))
    words = "schema version 0, and this megascore goes on from 1 only"
    with RunFolder(tmp_path) as folder, pytest.raises(CheckpointError, match=words):
        folder.newest()


def test_a_folder_that_is_replaced_while_a_run_is_in_it_gets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    with RunFolder(path) as folder:
        path.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            folder.write(snapshot(1))
        path.mkdir()
        with pytest.raises(FileNotFoundError, match="replaced"):
            folder.write(snapshot(1))
    assert list(path.iterdir()) == []


def test_a_second_opener_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        assert is_in_use(tmp_path)
        with pytest.raises(CheckpointError, match=f"another run is using .* \\(process {os.getpid()} on "):
            RunFolder(tmp_path)
    assert not is_in_use(tmp_path)
    RunFolder(tmp_path).close()


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be used: Not a directory"):
        RunFolder(tmp_path / "file" / "checkpoints")


def test_snapshots_survive_bytes_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {
        "decoder.layers.0.a/ffn/l2_norm": {
            "sums": torch.rand(7, generator=generator, dtype=torch.float64),
            "num_calls": torch.tensor(3),
        },
        "decoder.layers.1.a/ffn/l2_norm": {},
    }
    original = Snapshot({"step": 5, "block": 2}, {"a": [1, 2.5, None, "x"]}, states, {"loss": torch.rand(2)})
    copy = Snapshot.from_bytes(original.to_bytes())
    assert (copy.cursor, copy.identity) == (original.cursor, original.identity)
    assert copy.states.keys() == states.keys()
    for key, state in states.items():
        assert copy.states[key].keys() == state.keys()
        assert all(torch.equal(copy.states[key][name], value) for name, value in state.items())
    assert torch.equal(copy.sums["loss"], original.sums["loss"])


def test_starting_afresh_drops_what_was_there_once_for_each_launch(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    (tmp_path / "progress.json").write_text("{}")
    foreign = tmp_path / "step-00000001.safetensors"
    foreign.write_text("somebody else's")
    with RunFolder(tmp_path) as folder:
        # Also where the launcher restarts ranks that had died before they came to this.
        folder.start_afresh("a", is_restart=True)
        assert folder.newest() is None
        assert not (tmp_path / "progress.json").exists()
    assert foreign.exists()
    write_steps(tmp_path, 3)
    with RunFolder(tmp_path) as folder:
        folder.start_afresh("a", is_restart=False)
        folder.start_afresh("b", is_restart=True)
        assert folder.newest() is not None
        folder.start_afresh("b", is_restart=False)
        assert folder.newest() is None
