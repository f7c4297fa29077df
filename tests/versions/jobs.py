"""Whole jobs that must give the scores of a full pass, whichever Megatron-Core runs them. Two processes.

`write_inputs` and `full_pass` are for the installed version, `run_jobs` for any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascore.config import ModelConfig, ParallelConfig
from tests.job.resumable import Job, run_and_stop_on_rank, run_on_rank
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

__all__ = ["JOBS", "MODELS", "OWN", "VersionJob", "full_pass", "run_job", "run_jobs", "write_inputs"]

NUM_STEPS = 3
SAMPLES_OF_STEP = 4
LENGTH = 16
MODELS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [
        {"target": "ffn"},
        {"target": "ffn", "method": "iterative_contribution", "iterations": NUM_STEPS},
        {"target": "attention_heads"},
        {"target": "kv_heads"},
        {"target": "hidden_size"},
        {"target": "layers"},
    ],
    "qwen3_moe": [{"target": target} for target in ("experts", "expert_ffn", "ffn", "hidden_size", "layers")],
}
"""What is scored, by the family of `tests.models`; the second one's second layer alone has no experts."""
SAVED_ON = {"qwen3": ParallelConfig(tensor=2, sequence=True), "qwen3_moe": ParallelConfig(expert=2)}
INSTALLED, OWN = "installed", "own"
"""Which version saved a Megatron checkpoint: the installed one, or the one that runs the jobs."""

TP = ("parallel.tensor=2", "parallel.sequence=true")
PP = ("parallel.pipeline=2",)
CHUNKS = (*PP, "parallel.virtual_pipeline=2")
BLOCKWISE = "run.blockwise=true"


@dataclass(frozen=True)
class VersionJob:
    """A job on two processes."""

    family: str
    overrides: Sequence[str]
    saved_by: str | None = None
    """Of a Megatron checkpoint; None: the model is a Hugging Face one."""
    stopped_on: Sequence[str] | None = None
    """Overrides of a first start that is stopped after a step."""


JOBS = {
    "own torch_dist, stopped at TP=2 SP, gone on at PP=2 with 2 chunks": VersionJob(
        "qwen3", CHUNKS, saved_by=OWN, stopped_on=TP
    ),
    "one layer at a time, PP=2": VersionJob("qwen3", (BLOCKWISE, *PP)),
    "other torch_dist, one layer at a time, TP=2 SP": VersionJob("qwen3", (BLOCKWISE, *TP), saved_by=INSTALLED),
    "experts, TP=2 SP, EP=2": VersionJob("qwen3_moe", (*TP, "parallel.expert=2")),
    "experts, own torch_dist, TP=2 SP, ETP=2": VersionJob("qwen3_moe", (*TP, "parallel.expert_tensor=2"), saved_by=OWN),
    "experts, other torch_dist, one layer at a time, EP=2": VersionJob(
        "qwen3_moe", (BLOCKWISE, "parallel.expert=2"), saved_by=INSTALLED
    ),
}


def write_inputs(pool: WorkerPool, inputs: Path) -> None:
    """Write models, as Hugging Face and Megatron checkpoints, and samples into a folder."""
    for family in MODELS:
        save_checkpoint(inputs / family, family)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (NUM_STEPS * SAMPLES_OF_STEP, LENGTH))
    np.save(inputs / "tokens.npy", tokens)
    pool.run(2, _save_on_rank, inputs, inputs / INSTALLED)


def full_pass(pool: WorkerPool, inputs: Path, folder: Path, family: str) -> Job:
    """Run the job, in one process, that others of this family are compared with."""
    job = _make_job(folder, inputs, family, {"hf": str(inputs / family)})
    told = pool.run(1, run_on_rank, job)
    assert job.output.exists(), told
    return job


def run_jobs(pool: WorkerPool, inputs: Path, folder: Path) -> None:
    """Save the models as Megatron checkpoints, and run all `JOBS`: the folder gets a folder of each."""
    pool.run(2, _save_on_rank, inputs, folder / OWN)
    for name, job in JOBS.items():
        run_job(pool, inputs, folder, name, job)


def run_job(pool: WorkerPool, inputs: Path, folder: Path, name: str, what: VersionJob) -> Job:
    """Run one job in the folder of that name; checkpoints of `OWN` are those in ``folder``."""
    source = {"hf": str(inputs / what.family)}
    if what.saved_by is not None:
        root = folder if what.saved_by == OWN else inputs
        source = {"load": str(root / what.saved_by / what.family)}
    job, overrides = _make_job(folder / name, inputs, what.family, source), tuple(what.overrides)
    if what.stopped_on is not None:
        keep = f"run.checkpoint_dir={job.checkpoints}"
        told = pool.run(2, run_and_stop_on_rank, job, 0, (keep, *what.stopped_on))
        assert all("Preempted: stopped by SIGTERM after step 1" in text for text in told), (name, told)
        overrides = (keep, *overrides)
    told = pool.run(2, run_on_rank, job, overrides)
    assert job.output.exists(), (name, told)
    assert ("going on from" in told[0]) == (what.stopped_on is not None), (name, told)
    return job


def _make_job(folder: Path, inputs: Path, family: str, model: dict[str, str]) -> Job:
    folder.mkdir(parents=True)
    job = Job(folder)
    sections = {
        "model": {**model, "dtype": "float64"},
        "data": {"tokens": str(inputs / "tokens.npy"), "sequence_length": LENGTH},
        "scores": MODELS[family],
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": SAMPLES_OF_STEP, "timeout_minutes": 1},
    }
    job.config.write_text(json.dumps(sections))
    return job


def _save_on_rank(inputs: Path, folder: Path) -> None:
    # First of all: it imports Megatron as a machine without GPU and triton can.
    import_module("megascore.mcore")
    from megascore.mcore.models.build import load_model
    from megascore.mcore.world.parallel_world import parallel_world

    cpu = torch.device("cpu")
    for family, parallel in SAVED_ON.items():
        with parallel_world(parallel, cpu, timedelta(minutes=1)):
            chunks = load_model(ModelConfig(hf=str(inputs / family), dtype="float64"), parallel, cpu, LENGTH)
            save_torch_dist(chunks, folder / family, args=training_args(inputs / family))
