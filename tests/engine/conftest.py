"""Workers with Transformer Engine, for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.layers import start
from tests.engine.packages import fetch_engine
from tests.pool import WorkerPool

ENGINE = "2.11.0"
"""The newest that Megatron-Core 0.16 takes, by its own requirements."""


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_engine(ENGINE, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def engine(engine_folder: Path) -> Iterator[WorkerPool]:
    """Gloo processes as those of ``world``, whose models have the layers of Transformer Engine."""
    pool = WorkerPool(start, engine_folder)
    yield pool
    pool.close()
