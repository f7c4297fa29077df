"""Fixtures of whole jobs. Megatron is imported once, outside of any test."""

from __future__ import annotations

from pathlib import Path

import pytest

import megascore.job.job  # noqa: F401
from tests.job.resumable import Job, make_job, run_on_rank
from tests.mcore.conftest import saved  # noqa: F401 - a fixture that both folders use
from tests.models import save_checkpoint, save_tokenizer
from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model and the text that all jobs of `make_job` share; not changed by any test."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="session")
def undisturbed(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    """Return a job of `make_job` that has run to its end, in a full pass on one process; not changed by any test."""
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "run", model_root)
    world.run(1, run_on_rank, job)
    assert job.output.exists()
    return job


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama with a tokenizer; not changed by any test."""
    return save_tokenizer(save_checkpoint(tmp_path_factory.mktemp("job") / "llama", "llama"))
