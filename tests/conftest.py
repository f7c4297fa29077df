"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def world() -> Iterator[WorkerPool]:
    """Gloo worker processes: ``world.run(world_size, function, *args)`` returns the results by rank."""
    pool = WorkerPool()
    yield pool
    pool.close()
