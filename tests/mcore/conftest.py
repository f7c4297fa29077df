"""One import of Megatron, outside of any test: what its modules warn of on import would be errors inside."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megascore.job.job  # noqa: F401
from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import parallel_world
from tests.mcore.torch_dist import Colour, save_torch_dist, training_args
from tests.models import save_checkpoint


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
