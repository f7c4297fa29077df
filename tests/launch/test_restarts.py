"""Runs under torchrun itself: its own restart after a killed rank, its own signal on a stop, its own summary."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megascore.resume.progress_file import read_status
from tests.job.resumable import Job, make_job
from tests.pool import WORKER_ENVIRONMENT

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "run", tmp_path / "model", "float32")


@contextmanager
def torchrun(job: Job, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **WORKER_ENVIRONMENT, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["--local-addr=127.0.0.1", *options, "-m", "megascore", "score", str(job.config), "parallel.tensor=2"]
    with (job.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_checkpoint(job: Job) -> None:
    deadline = time.monotonic() + 120
    while not any(job.checkpoints.glob("megascore-step-*")):
        assert time.monotonic() < deadline, (job.folder / "log.txt").read_text()
        time.sleep(0.002)


def test_torchruns_own_restart_goes_on_after_a_killed_rank(job: Job) -> None:
    with torchrun(job, "--max-restarts=1") as process:
        wait_for_checkpoint(job)
        os.kill(int(read_status(job.checkpoints)["process"]), signal.SIGKILL)
        assert process.wait(120) == 0, (job.folder / "log.txt").read_text()
    log = (job.folder / "log.txt").read_text()
    assert "going on from" in log
    assert "Scores written to" in log


def test_torchruns_signal_lets_the_run_save_and_the_same_command_goes_on(job: Job) -> None:
    job.config.write_text(job.config.read_text().replace("checkpoint_interval: 1", "checkpoint_seconds: 0.001"))
    with torchrun(job) as process:
        wait_for_checkpoint(job)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    assert "stopped by SIGTERM" in (job.folder / "log.txt").read_text()
    assert read_status(job.checkpoints)["state"] == "stopped"
    with torchrun(job) as process:
        assert process.wait(120) == 0, (job.folder / "log.txt").read_text()
    assert "going on from" in (job.folder / "log.txt").read_text()


def test_a_killed_launcher_takes_its_ranks_along_and_the_same_command_goes_on(job: Job) -> None:
    with torchrun(job) as process:
        wait_for_checkpoint(job)
        process.kill()
    with torchrun(job) as process:
        assert process.wait(120) == 0, (job.folder / "log.txt").read_text()
    log = (job.folder / "log.txt").read_text()
    # Its ranks may have come to the end in the moment before they noticed.
    assert "going on from" in log or "holds the finished scores" in log
    assert "another run is using" not in log
    assert job.output.exists()


FAILING_WORLD = """
import datetime, sys
import torch, torch.distributed as dist
from rich.console import Console
from megascore.errors import DataError
from megascore.process.failures import run_and_report

def job():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    dist.barrier()
    if dist.get_rank() == 1:
        raise DataError("the text of rank 1 is too short")
    dist.all_reduce(torch.ones(1))
    return 0

sys.exit(run_and_report(job, Console(stderr=True)))
"""


def test_torchrun_shows_the_error_of_the_rank_that_failed(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING_WORLD)
    environment = {**os.environ, **WORKER_ENVIRONMENT, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode != 0
    assert "megascore: error: rank 1: the text of rank 1 is too short" in result.stderr
    root_cause = result.stderr.partition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "exitcode  : 2" in root_cause
    assert "megascore: error: rank 1: the text of rank 1 is too short" in root_cause
    assert "DataError" not in root_cause
