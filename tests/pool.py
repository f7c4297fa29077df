"""A pool of gloo worker processes, made once for a whole test session.

A worker costs seconds of imports, so it is kept and forms a new world for each call: `WorkerPool.run` gives the first
``world_size`` workers a fresh torch.distributed world, runs a module-level function on each, and takes the world apart.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

__all__ = ["RankErrors", "WorkerPool"]

HOST = "127.0.0.1"
GRACE_SECONDS = 10.0
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
if sys.platform == "linux":
    # Otherwise gloo resolves the host name, which many containers cannot.
    WORKER_ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"


class RankErrors(AssertionError):  # noqa: N818 - it holds the errors of several ranks
    """Some ranks of a call failed or did not answer; the text has each one's traceback, the first failure first."""


@dataclass(frozen=True)
class _Call:
    name: str
    rank: int
    world_size: int
    timeout: float
    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


class WorkerPool:
    """Worker processes that form gloo worlds of any size on demand."""

    def __init__(self, initializer: Callable[..., None] | None = None, *args: Any) -> None:
        """Start nothing: workers come with the first call that needs them.

        Args:
            initializer: Called as ``initializer(*args)`` in each worker before anything else, so that it can decide
                what later imports find: a module-level function of a module that imports little. Its errors are
                those of the worker's first call.
            args: Picklable arguments.
        """
        self._initializer = None if initializer is None else partial(initializer, *args)
        self._store: TCPStore | None = None
        self._workers: list[_Worker] = []
        self._num_calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Run ``function(*args)`` on every rank of a new world.

        Args:
            world_size: Number of ranks.
            function: A module-level function; it is found by its name in the worker.
            args: Picklable arguments, the same for all ranks.
            timeout: Seconds until the ranks that have not answered are killed.

        Returns:
            What each rank returned, by rank. Tensors come back as copies.

        Raises:
            RankErrors: a rank raised or did not answer in time.
        """
        self._start_workers(world_size)
        self._num_calls += 1
        deadline = time.monotonic() + timeout
        for rank in range(world_size):
            call = _Call(f"call{self._num_calls}", rank, world_size, timeout, function, args)
            self._workers[rank].connection.send_bytes(pickle.dumps(call))
        results, errors = self._collect(world_size, deadline)
        if errors:
            raise RankErrors(f"{function.__name__} on {world_size} ranks:\n" + "\n".join(errors))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Stop all workers."""
        for worker in self._workers:
            _kill(worker, show_stack=False)
        self._workers.clear()
        self._store = None

    def _start_workers(self, world_size: int) -> None:
        if self._store is None:
            self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
        os.environ.update(WORKER_ENVIRONMENT)
        try:
            while len(self._workers) < world_size:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, self._store.port, self._initializer), daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(process, here))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def _collect(self, world_size: int, deadline: float) -> tuple[dict[int, Any], list[str]]:
        """Wait for all ranks; once one has failed the others only get a moment, for they may wait for it."""
        waiting = {self._workers[rank].connection: rank for rank in range(world_size)}
        results: dict[int, Any] = {}
        errors: list[str] = []
        broken: list[int] = []
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"ranks {sorted(waiting.values())} did not answer in time.")
                broken.extend(waiting.values())
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, f"its process died, exit code {self._workers[rank].process.exitcode}"
                    broken.append(rank)
                if succeeded:
                    results[rank] = value
                else:
                    errors.append(f"rank {rank}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if broken:
            self._replace_from(min(broken))
        return results, errors

    def _replace_from(self, rank: int) -> None:
        """Drop this worker and those after it; the next call starts new ones."""
        for worker in self._workers[rank:]:
            _kill(worker, show_stack=True)
        del self._workers[rank:]


def _kill(worker: _Worker, *, show_stack: bool) -> None:
    if show_stack and worker.process.is_alive():
        assert worker.process.pid is not None
        # faulthandler writes where a hanging worker stands to its stderr.
        os.kill(worker.process.pid, signal.SIGUSR1)
        worker.process.join(0.2)
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, port: int, initializer: Callable[[], None] | None) -> None:
    """Answer calls until the parent closes the connection."""
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False)
    failure = _failure_of(initializer)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(failure or _answer(request, store))


def _failure_of(initializer: Callable[[], None] | None) -> bytes | None:
    """Return what a worker that could not start answers to every call."""
    try:
        if initializer is not None:
            initializer()
    except Exception as error:
        return pickle.dumps((False, f"{type(error).__name__} at the start: {error}\n{traceback.format_exc()}"))
    return None


def _answer(request: bytes, store: Store) -> bytes:
    try:
        call: _Call = pickle.loads(request)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(call.name, store),
            rank=call.rank,
            world_size=call.world_size,
            timeout=timedelta(seconds=call.timeout),
        )
        return pickle.dumps((True, call.function(*call.args)))
    except Exception as error:
        return pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        _leave_world()


def _leave_world() -> None:
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        # Gloo's threads free the last tensors in it, as in megascore.parallel.comm.leave_world.
        time.sleep(0.02)
        dist.destroy_process_group()
