"""Imports Megatron once, outside of any test: what its modules warn of on import would be errors inside."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megascore.mcore.job  # noqa: F401
from megascore.mcore.build import load_model
from megascore.mcore.world import parallel_world
from megascore.scoring.config import ModelConfig, ParallelConfig
from tests.mcore.resumable import Job, make_job, run_on_rank
from tests.mcore.torch_dist import Colour, save_torch_dist, training_args
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Hugging Face checkpoint ``hf`` and, from it, Megatron's ``ck``."""
    root, cpu = tmp_path_factory.mktemp("saved"), torch.device("cpu")
    save_checkpoint(root / "hf", "qwen3", num_hidden_layers=2)
    with parallel_world(ParallelConfig(), cpu, timedelta(minutes=1)):
        chunks = load_model(ModelConfig(hf=str(root / "hf"), dtype="float32"), ParallelConfig(), cpu, 16)
        save_torch_dist(chunks, root / "ck", args=training_args(root / "hf"), colour=Colour.RED)
    assert not dist.is_initialized()
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "ck", tmp_path / "ck")
    return tmp_path / "ck"
