"""Ranks of a job as processes of their own, that can be killed; forked from a server that has imported everything.

A rank costs milliseconds instead of the seconds of its imports, so a test can start and kill dozens.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["RankProcesses", "free_port"]

PRELOADED = ["megascore.job.job", "transformers", "tokenizers"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
if sys.platform == "linux":
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"


class RankProcesses:
    """``megascore`` started with the same arguments on every rank of a world, as torchrun would do it."""

    def __init__(
        self, world_size: int, arguments: Sequence[str], log: Path, before: Callable[[], None] | None = None
    ) -> None:
        """Start all ranks.

        Args:
            world_size: Number of ranks.
            arguments: Of the command line.
            log: File to which all of them write.
            before: A module-level function that each rank calls first.
        """
        context = _server()
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            environment = {
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = context.Process(target=_run, args=(list(arguments), environment, str(log), before), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Return the exit codes; once a rank has failed the others get a moment, as torchrun gives them."""
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode not in (None, 0) for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10.0)
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.005)
        return [int(process.exitcode or 0) for process in self._joined()]

    def are_running(self) -> bool:
        """Whether no rank has ended."""
        return all(process.exitcode is None for process in self.processes)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank, if it still runs."""
        process = self.processes[rank]
        if process.exitcode is None and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Send SIGKILL to some ranks, or to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.signal(rank, signal.SIGKILL)

    def _joined(self) -> list[BaseProcess]:
        for process in self.processes:
            process.join()
        return self.processes


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(arguments: list[str], environment: dict[str, str], log: str, before: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from megascore.cli import main

    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))
