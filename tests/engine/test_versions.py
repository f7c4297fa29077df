"""Newer Megatron-Core versions with the newest Transformer Engine: scores are those of Megatron's own layers.

Megatron-Core 0.17 to 0.19 name no upper bound for Transformer Engine; 0.16, with which all other tests of the folder
run, takes those before 2.12.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from megascore.config import ParallelConfig
from tests.engine.layers import on_megatrons_own_layers, start
from tests.engine.packages import fetch_engine
from tests.mcore.oracle import all_scores
from tests.mcore.sites import test_scores_on_every_layout
from tests.models import save_checkpoint
from tests.pool import WorkerPool
from tests.versions.test_versions import VERSIONS, download

ENGINE = "2.20.2"
"""The newest that was there when this was written; newer ones may need other kernels."""
TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP=2 with sequence parallel": {"tensor": 2, "sequence": True},
    "PP=2": {"pipeline": 2},
}


@pytest.fixture(scope="module")
def newest_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_engine(ENGINE, tmp_path_factory.mktemp("newest_engine"))


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_a_newer_megatron_gives_the_same_scores(version: str, newest_engine: Path, tmp_path: Path) -> None:
    checkpoint = str(save_checkpoint(tmp_path / "model", "llama"))
    pool = WorkerPool(start, newest_engine, download(version, tmp_path / "wheel"))
    try:
        assert pool.run(1, version_of_megatron)[0].startswith(f"{version}.")
        compute = on_megatrons_own_layers, test_scores_on_every_layout.compute_expected
        expected = load(pool.run(1, as_bytes, *compute, checkpoint, {})[0])
        wanted = all_scores(test_scores_on_every_layout.NUM_STEPS)
        for layout, degrees in LAYOUTS.items():
            parallel = ParallelConfig(**degrees)
            score = test_scores_on_every_layout.score
            for rank in pool.run(2, as_bytes, score, checkpoint, parallel, "float64", wanted):
                scores = load(rank)
                assert scores.keys() <= expected.keys()
                assert len(scores) > len(wanted)
                for key, value in scores.items():
                    torch.testing.assert_close(value, expected[key], rtol=TOLERANCE, atol=0, msg=f"{key} on {layout}")
    finally:
        pool.close()


def version_of_megatron() -> str:
    import megatron.core

    return str(megatron.core.__version__)


def as_bytes(function: Callable[..., dict[str, Any]], *args: Any) -> bytes:
    """Megatron 0.18 and later change how a tensor is pickled, for readers that have it."""
    return save({key: value.contiguous() for key, value in function(*args).items()})
