"""The torchrun agent of the launch scripts: what workers get when they are to stop, and the exit code.

The workers are small scripts without torch, so that a world takes a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch.agent import find_workers
from tests.launch.processes import (
    REPOSITORY,
    SECONDS,
    environment,
    start,
    wait_until,
)

WORKER = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), os.environ["NOTES"]
def note(word):
    with open(f"{folder}/{word}{rank}", "a") as file:
        file.write("x")
"""
# The later ranks need longer to save, as with a slow disk.
SAVES = """
def stop(*_):
    signal.signal(signal.SIGTERM, lambda *_: None)  # a flag, in megascore
    time.sleep(rank)
    note("saved")
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR2, lambda *_: note("kept"))
note("started")
time.sleep(60)
"""
# As in Python's last moments, when it has put the handlers of signals back.
LEAVES_SLOWLY = """
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    note("saved")
    time.sleep(60)
signal.signal(signal.SIGUSR1, stop)
note("started")
time.sleep(60)
"""
HAS_NO_HANDLER = 'note("started"); time.sleep(60)'
DOES_NOT_STOP = """
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: (note("term"), os.path.getsize(f"{folder}/term{rank}") > 1 and sys.exit(1)))
note("started")
while True:
    time.sleep(0.1)
"""
FAILS_AS_ONE = "sys.exit(2) if rank else time.sleep(60)"
IS_KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
# Together, for the first one to fail ends the others wherever they are.
FAILS_ONCE = """
note("started")
while not all(os.path.exists(f"{folder}/started{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


class World:
    """An agent with workers that run one of the scripts above."""

    def __init__(
        self,
        folder: Path,
        script: str,
        num_workers: int,
        max_restarts: int = 0,
        shell: Sequence[str] = (),
        **changes: str,
    ) -> None:
        (folder / "worker.py").write_text(WORKER + script)
        self.folder = folder
        self.num_workers = num_workers
        self.process = start(
            *shell,
            *(sys.executable, REPOSITORY / "launch" / "agent.py", "--standalone", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", str(num_workers), "--max-restarts", str(max_restarts), folder / "worker.py"),
            env=environment(NOTES=str(folder), OMP_NUM_THREADS="1", **changes),
            cwd=folder,
        )

    def count(self, word: str) -> list[int]:
        """How often each rank noted a word."""
        paths = [self.folder / f"{word}{rank}" for rank in range(self.num_workers)]
        return [path.stat().st_size if path.exists() else 0 for path in paths]

    def signal(self, signum: signal.Signals) -> None:
        wait_until(lambda: all(self.count("started")), self.process)
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str]:
        """Exit code, and what was written to standard error."""
        _, error = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, error


@pytest.fixture
def sleepers() -> Iterator[dict[bool, int]]:
    """Process ids of two children; True for the one that leads a session."""
    processes = {leads: subprocess.Popen(["sleep", "60"], start_new_session=leads) for leads in (True, False)}
    yield {leads: process.pid for leads, process in processes.items()}
    for process in processes.values():
        process.kill()
        process.wait()


def test_workers_are_the_children_that_lead_a_session(sleepers: dict[bool, int]) -> None:
    assert sleepers[True] in find_workers()
    assert sleepers[False] not in find_workers()
    assert os.getpid() not in find_workers()


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_every_rank_save_and_restarts_none(signum: signal.Signals, tmp_path: Path) -> None:
    world = World(tmp_path, SAVES, num_workers=2, max_restarts=2)
    world.signal(signum)
    code, error = world.end()
    assert code == 75, error
    assert world.count("saved") == [1, 1]
    assert world.count("started") == [1, 1]
    assert "Traceback" not in error


def test_the_second_sigterm_does_not_take_the_time_away(tmp_path: Path) -> None:
    world = World(tmp_path, SAVES, num_workers=2)
    world.signal(signal.SIGUSR1)
    wait_until(lambda: world.count("saved")[0] == 1, world.process)
    for _ in range(2):
        world.process.send_signal(signal.SIGTERM)
    code, error = world.end()
    assert code == 75, error
    assert world.count("saved") == [1, 1]


def test_the_second_signal_may_kill_a_worker_that_has_saved_and_is_leaving(tmp_path: Path) -> None:
    world = World(tmp_path, LEAVES_SLOWLY, num_workers=2)
    world.signal(signal.SIGUSR1)
    wait_until(lambda: all(world.count("saved")), world.process)
    world.process.send_signal(signal.SIGTERM)
    code, error = world.end()
    assert code == 75, error


def test_nohup_is_respected(tmp_path: Path) -> None:
    world = World(tmp_path, SAVES, num_workers=1, shell=("sh", "-c", "trap '' HUP; exec \"$@\"", "sh"))
    world.signal(signal.SIGHUP)
    world.signal(signal.SIGUSR1)
    code, error = world.end()
    assert code == 75, error
    assert "SIGUSR1: 1 worker(s)" in error
    assert "SIGHUP" not in error


def test_a_wish_to_save_is_passed_on_and_the_run_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, SAVES, num_workers=1)
    world.signal(signal.SIGUSR2)
    wait_until(lambda: world.count("kept") == [1], world.process)
    world.signal(signal.SIGUSR1)
    code, error = world.end()
    assert code == 75, error


def test_a_worker_that_was_still_starting_does_not_make_it_a_failure(tmp_path: Path) -> None:
    world = World(tmp_path, HAS_NO_HANDLER, num_workers=1)
    world.signal(signal.SIGUSR1)
    assert world.end()[0] == 75


def test_workers_that_do_not_stop_are_ended_after_the_time_given(tmp_path: Path) -> None:
    world = World(tmp_path, DOES_NOT_STOP.replace("> 1", "> 0"), num_workers=1, MEGASCORE_STOP_SECONDS="0.5")
    world.signal(signal.SIGUSR1)
    code, error = world.end()
    assert code == 128 + signal.SIGUSR1
    assert "1 worker(s) still there after 0.5 s" in error


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    world = World(tmp_path, DOES_NOT_STOP, num_workers=1)
    world.signal(signal.SIGINT)
    wait_until(lambda: world.count("term") == [1], world.process)
    world.process.send_signal(signal.SIGINT)
    assert world.end()[0] == 128 + signal.SIGINT


@pytest.mark.parametrize(("script", "code"), [(FAILS_AS_ONE, 2), (IS_KILLED, 128 + signal.SIGKILL)])
def test_the_exit_code_is_that_of_the_worker_that_failed_first(script: str, code: int, tmp_path: Path) -> None:
    world = World(tmp_path, script, num_workers=2)
    ended, error = world.end()
    assert ended == code, error
    assert "Root Cause" in error


def test_a_failed_world_is_started_again_as_often_as_asked(tmp_path: Path) -> None:
    world = World(tmp_path, FAILS_ONCE, num_workers=2, max_restarts=1)
    code, error = world.end()
    assert code == 0, error
    assert world.count("started") == [2, 2]
