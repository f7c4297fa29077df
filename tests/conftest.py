"""The fixture and the marks that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def world() -> Iterator[WorkerPool]:
    """Gloo worker processes: ``world.run(world_size, function, *args)`` returns the results by rank."""
    pool = WorkerPool()
    yield pool
    pool.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a test the mark of its folder, `pytestmark` in the folder's __init__.py, unless it starts a world."""
    if isinstance(item, pytest.Function) and "world" not in item.fixturenames:
        mark = getattr(sys.modules[item.module.__package__], "pytestmark", None)
        if mark is not None:
            item.add_marker(mark)
