"""The launch scripts, started as a user's shell would, and waiting for what they write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "REPOSITORY",
    "environment",
    "put_fake_megascore",
    "start",
    "wait_until",
]

REPOSITORY = Path(__file__).parents[2]
SECONDS = 300

# Stands in for the package: tells what it was started with, and ends as FAKE_END says.
FAKE_MEGASCORE = """
import os, pathlib, signal, sys, time
notes = pathlib.Path(os.environ["FAKE_NOTES"])
end, rank = os.environ.get("FAKE_END", "0"), os.environ.get("RANK", "")
if sys.argv[1] == "status":
    (notes / "status").write_text(" ".join(sys.argv[2:]))
    sys.exit(int(os.environ["FAKE_STATUS"]))
def stop(signum, frame):
    (notes / f"signal{rank}").write_text(signal.Signals(signum).name)
    sys.exit(int(end.partition(" ")[2]))
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
(notes / f"ready{rank}").write_text("\\n".join([*sys.argv[1:], os.environ.get("OMP_NUM_THREADS", "")]))
if end.startswith("wait"):
    time.sleep(60)
sys.exit(int(end))
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with this Python as the active one, without a job of torchrun's or Slurm's."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "MEGASCORE", "TORCH", "PET_", "NCCL", "GLOO", "CONDA", "OMP_"))
    }
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        ours.pop(name, None)
    return ours | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(REPOSITORY)} | changes


def put_fake_megascore(folder: Path, **settings: str) -> dict[str, str]:
    """Make the stand-in for the package in a folder; return the environment in which it is the one that runs."""
    (folder / "packages" / "megascore").mkdir(parents=True)
    (folder / "packages" / "megascore" / "__init__.py").touch()
    (folder / "packages" / "megascore" / "__main__.py").write_text(FAKE_MEGASCORE)
    return environment(PYTHONPATH=str(folder / "packages"), FAKE_NOTES=str(folder), **settings)


def start(*command: str | Path, env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_obey_signals,
    )


def _obey_signals() -> None:
    # A shell lets what it runs in the background ignore Ctrl-C, and nohup lets it ignore SIGHUP: these tests too, and
    # with them all that they start.
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a condition that a process brings about; fail with what it said if it ends before that."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError("\n".join(process.communicate()))
        time.sleep(0.05)
