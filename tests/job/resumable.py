"""A tiny job that saves after every step, and ways to stop it where a test wants."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import megascore
from megascore.config import load_config
from megascore.errors import MegascoreError
from megascore.runs.steps import Cursor, OnStep
from tests.models import save_checkpoint, save_tokenizer

__all__ = ["NUM_STEPS", "Job", "assert_same_scores", "copy_of", "make_job", "run_and_stop_on_rank", "run_on_rank"]

NUM_STEPS = 6
SAMPLES_OF_STEP = 4
LENGTH = 16
SCORES = (
    "[{target: ffn}, {target: kv_heads}, {target: layers}, {target: hidden_size, method: layer_norm_contribution}, "
    f"{{target: ffn, method: iterative_contribution, iterations: {NUM_STEPS}}}, "
    "{target: hidden_size}, {target: ffn, method: independent_contribution}]"
)
"""One of each kind: sums, means, statistics of samples, weights, and decisions."""


@dataclass(frozen=True)
class Job:
    """A job's files."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def output(self) -> Path:
        return self.folder / "scores.safetensors"

    def scores(self) -> megascore.Scores:
        return megascore.load_scores(self.output)


def make_job(folder: Path, model_root: Path, dtype: str = "float64") -> Job:
    """Write a job's config; model and text are made once in ``model_root``."""
    model, text = model_root / "llama", model_root / "words.txt"
    if not model.is_dir():
        save_tokenizer(save_checkpoint(model, "llama", num_key_value_heads=4))
        num_words = NUM_STEPS * SAMPLES_OF_STEP * LENGTH
        text.write_text(" ".join(f"w{(7 * i * i + i // 3) % 100}" for i in range(num_words)))
    folder.mkdir(parents=True)
    job = Job(folder)
    job.config.write_text(
        f"model: {{hf: '{model}', dtype: {dtype}}}\n"
        f"data: {{text: '{text}', sequence_length: {LENGTH}}}\n"
        f"scores: {SCORES}\n"
        f"run: {{output: '{job.output}', checkpoint_dir: '{job.checkpoints}', checkpoint_interval: 1, device: cpu, "
        f"global_batch_size: {SAMPLES_OF_STEP}, timeout_minutes: 1}}\n"
    )
    return job


def copy_of(job: Job, folder: Path, model_root: Path) -> Job:
    """Make a job that begins with the checkpoints of another."""
    copy = make_job(folder, model_root)
    shutil.copytree(job.checkpoints, copy.checkpoints)
    return copy


def run_on_rank(job: Job, overrides: Sequence[str] = (), on_step: OnStep | None = None, **seams: Any) -> str:
    """Run the job in a world of the pool; return what was shown, or the text of a user's error.

    The seams are those of `run_job`.
    """
    from megascore.job.job import run_job

    shown = io.StringIO()
    try:
        run_job(load_config(job.config, overrides), Console(file=shown, width=200), on_step=on_step, **seams)
    except MegascoreError as error:
        return f"{shown.getvalue()}{type(error).__name__}: {error}"
    return shown.getvalue()


def run_and_stop_on_rank(
    job: Job, step: int, overrides: Sequence[str] = (), number: int = signal.SIGTERM, rank: int = 0
) -> str:
    """`run_on_rank`, with a signal to one rank when it has done the step of this number, counted from 0."""
    import torch.distributed as dist

    def send_signal(cursor: Cursor) -> None:
        if cursor.step == step + 1 and dist.get_rank() == rank:
            os.kill(os.getpid(), number)

    return run_on_rank(job, overrides, send_signal)


def assert_same_scores(scores: megascore.Scores, expected: megascore.Scores, tolerance: float) -> None:
    """Every score within a relative tolerance, and the order of the iterative one identical."""
    assert set(scores) == set(expected)
    assert scores.metadata["num_tokens"] == expected.metadata["num_tokens"]
    assert scores.metadata["sites"] == expected.metadata["sites"]
    for key, value in expected.items():
        if "iterative" in key:
            assert torch.equal(scores[key], value), key
        else:
            torch.testing.assert_close(
                scores[key], value, rtol=tolerance, atol=0, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert abs(scores.metadata["loss"] / expected.metadata["loss"] - 1) <= tolerance
