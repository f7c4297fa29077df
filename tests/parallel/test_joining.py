"""Ranks that wait for one that never comes: how a signal or the timeout ends them, and what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.ranks import free_port

PROJECT = Path(__file__).parents[2]
SECONDS = 120
"""Only a failing test waits so long."""
JOINS = """
import sys
from datetime import timedelta
from rich.console import Console
from megascore.parallel.rendezvous import store_of_environment
from megascore.process.failures import run_and_report
from megascore.process.signals import Signals

said = []

def join():
    with Signals() as signals:
        def stop():
            # Only when it is asked are all signals noted.
            if not said:
                said.append(print("waits", flush=True))
            return signals.stop

        store_of_environment(timedelta(seconds=float(sys.argv[1])), stop)
    return 0

sys.exit(run_and_report(join, Console(stderr=True)))
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    """Starts one rank of a world of the given size, which waits for the others for the given seconds."""
    processes = []

    def start_rank(rank: int, world_size: int, timeout: float) -> subprocess.Popen[str]:
        world = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        process = subprocess.Popen(
            [sys.executable, "-c", JOINS, str(timeout)],
            env={**environment, **world, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
        return process

    yield start_rank
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=SECONDS)
    return process.returncode, error


def wait_until_rank_1_is_heard(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=SECONDS), wait_for_workers=False)
    room = store.get("megascore/leader").decode()
    store.wait([f"megascore/{room}/answer to 1"], timedelta(seconds=SECONDS))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_rank_that_keeps_the_store(signum: signal.Signals, start: Start) -> None:
    process = start(0, 4, timeout=600)
    process.send_signal(signum)
    code, error = end(process)
    assert code == 75
    (line,) = error.splitlines()
    assert line.startswith(f"megascore: stopped by {signum.name} while waiting for ranks 1, 2, 3 to join")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_rank_that_no_store_answers(signum: signal.Signals, start: Start) -> None:
    process = start(1, 2, timeout=600)
    process.send_signal(signum)
    code, error = end(process)
    assert code == 75
    (line,) = error.splitlines()
    assert f"stopped by {signum.name} while waiting for rank 0 (no answer from 127.0.0.1:" in line


def test_a_signal_to_one_rank_ends_all_and_the_missing_ones_are_said_once(start: Start, port: int) -> None:
    first, second = start(0, 3, timeout=600), start(1, 3, timeout=600)
    wait_until_rank_1_is_heard(port)
    second.send_signal(signal.SIGTERM)
    (second_code, second_error), (code, error) = end(second), end(first)
    assert (code, second_code) == (75, 75)
    assert second_error == ""
    assert error.count("\n") == 1
    assert "while waiting for rank 2 to join" in error


def test_at_the_timeout_the_missing_ones_are_said_once(start: Start) -> None:
    # Rank 1 is there before rank 0 begins to count.
    second = start(1, 3, timeout=SECONDS)
    first = start(0, 3, timeout=2)
    (code, error), (second_code, second_error) = end(first), end(second)
    assert (code, second_code) == (3, 3)
    assert second_error == ""
    (line,) = error.splitlines()
    assert line.startswith("megascore: rank 0 stopped: rank 2 did not join the run in time, within 2 s")


def test_at_the_timeout_the_address_that_gave_no_answer_is_named(start: Start) -> None:
    code, error = end(start(1, 2, timeout=0.5))
    assert code == 3
    (line,) = error.splitlines()
    assert "rank 0 (no answer from 127.0.0.1:" in line
