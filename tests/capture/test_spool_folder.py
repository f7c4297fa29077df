"""Spool folders of processes that were killed: the next store in the same place removes them, and no others."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megascore.capture import SpoolStore
from megascore.capture.spool_folder import SpoolFolder
from megascore.files.locks import Owner

OTHER_PROCESS = """
import sys, time, torch
from megascore.capture import SpoolStore
store = SpoolStore(sys.argv[1])
store.put("a", torch.ones(1000))
print("ready", flush=True)
time.sleep(600)
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a spool folder of its own."""
    process = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def spools(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_behind(folder: Path, **owner: object) -> Path:
    """A folder as a killed process leaves it; its lock file says who that was."""
    path = folder / "megascore-spool-1-0"
    path.mkdir()
    (path / "a.safetensors").write_bytes(bytes(2_000_000))
    (path / "lock").write_text(json.dumps(owner))
    return path


def test_the_folder_of_a_killed_process_is_removed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with other_process(tmp_path) as process:
        (name,) = spools(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / name / "a.safetensors").exists()
        store = SpoolStore(tmp_path)
    assert name not in spools(tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert f"removed {tmp_path / name} (0.0 MB), which process {process.pid} on " in told[0]
    store.close()
    assert spools(tmp_path) == []


def test_a_folder_in_use_by_another_process_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with other_process(tmp_path):
        (name,) = spools(tmp_path)
        # However long it has been quiet.
        os.utime(tmp_path / name, (0, 0))
        SpoolStore(tmp_path).close()
        assert spools(tmp_path) == [name]
        assert (tmp_path / name / "a.safetensors").exists()
    assert not caplog.records


def test_two_stores_of_one_process_share_a_place(tmp_path: Path) -> None:
    first = SpoolStore(tmp_path)
    first.put("a", torch.ones(3))
    second = SpoolStore(tmp_path)
    second.put("a", torch.zeros(3))
    assert torch.equal(first.get("a", "cpu"), torch.ones(3))
    second.close()
    assert torch.equal(first.get("a", "cpu"), torch.ones(3))


def test_a_process_number_that_is_in_use_again_proves_nothing(tmp_path: Path) -> None:
    path = left_behind(tmp_path, process=os.getpid(), host="here", kernel=Owner.here().kernel)
    SpoolStore(tmp_path).close()
    assert not path.exists()


def test_a_folder_of_another_machine_goes_only_when_it_has_long_been_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where storage does not show locks to other machines, that nobody here holds one proves nothing."""
    path = left_behind(tmp_path, process=1, host="elsewhere", kernel="another")
    SpoolStore(tmp_path).close()
    assert path.exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(path, (two_days_ago, two_days_ago))
    SpoolStore(tmp_path).close()
    assert not path.exists()
    assert "(2.0 MB), which process 1 on elsewhere left behind" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{", '{"process": 1}'])
def test_an_owner_that_has_not_said_who_it_is_may_be_on_another_machine(tmp_path: Path, content: str) -> None:
    path = left_behind(tmp_path)
    (path / "lock").write_text(content)
    SpoolStore(tmp_path).close()
    assert path.exists()


def test_what_is_no_folder_of_ours_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = left_behind(elsewhere, process=1, host="here", kernel=Owner.here().kernel)
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "megascore-spool-of-a-link").symlink_to(own)
    (folder / "megascore-spool-notes").write_text("mine")
    (folder / "megascore-spool-without-lock").mkdir()
    (folder / "megascore-spool-without-lock" / "a.safetensors").touch()
    (folder / "megascore-spool-empty").mkdir()
    before = spools(folder)
    SpoolStore(folder).close()
    assert spools(folder) == [name for name in before if not name.endswith("empty")]
    assert (own / "a.safetensors").exists()


def test_a_folder_that_is_taken_away_while_it_is_made_gives_way_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a folder and locking it, one who tidies up takes it for one that was left behind."""
    lock_file, taken = fcntl.flock, []

    def after_it_was_taken_away(lock: int, operation: int) -> None:
        if not taken:
            (path,) = tmp_path.iterdir()
            taken.append(path)
            (path / "lock").unlink()
            path.rmdir()
        lock_file(lock, operation)

    monkeypatch.setattr(fcntl, "flock", after_it_was_taken_away)
    store = SpoolStore(tmp_path)
    store.put("a", torch.ones(3))
    assert torch.equal(store.get("a", "cpu"), torch.ones(3))
    assert taken
    assert spools(tmp_path) != [taken[0].name]


def test_storage_without_locks_is_used_and_never_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_lock: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = SpoolStore(tmp_path)
    first.put("a", torch.ones(3))
    SpoolStore(tmp_path).close()
    assert torch.equal(first.get("a", "cpu"), torch.ones(3))
    first.close()
    assert spools(tmp_path) == []


def test_a_folder_that_cannot_say_whose_it_is_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_lock: int, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        SpoolFolder(tmp_path)
    assert not list(tmp_path.iterdir())
