"""Whole jobs with scores that need gradients: in any split, gone on with, refused, told what they cost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import megascore
from megascore.config import load_config
from megascore.errors import ConfigError
from tests.job.resumable import Job, assert_same_scores, copy_of, make_job, run_and_stop_on_rank, run_on_rank
from tests.models import save_checkpoint, save_tokenizer, tensors_of
from tests.pool import WorkerPool

SCORES = (
    "scores=[{target: ffn}, {target: ffn, method: taylor}, {target: attention_heads, method: taylor}, "
    "{target: layers, method: taylor}]"
)
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order."""


@pytest.fixture(scope="module")
def undisturbed(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "run", model_root)
    shown = world.run(1, run_on_rank, job, (SCORES, "run.micro_batch_size=4"))
    assert job.output.exists(), shown
    return job


@pytest.mark.parametrize(
    "overrides",
    [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",), ("run.micro_batch_size=2",)],
    ids=["TP 2 SP", "PP 2", "DP 2"],
)
def test_a_job_that_was_stopped_goes_on_in_another_layout_and_split(
    overrides: tuple[str, ...], undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    stopped = make_job(tmp_path / "stopped", model_root)
    shown = world.run(1, run_and_stop_on_rank, stopped, 2, (SCORES,))
    assert "Preempted" in shown[0], shown
    job = copy_of(stopped, tmp_path / "run", model_root)
    shown = world.run(2, run_on_rank, job, (SCORES, *overrides))
    assert job.output.exists(), shown
    assert_same_scores(job.scores(), undisturbed.scores(), TOLERANCE)


def test_it_has_errors_and_can_be_computed_again(undisturbed: Job, tmp_path: Path) -> None:
    scores = undisturbed.scores()
    key = "decoder.layers.1.mlp.linear_fc2/ffn/taylor"
    assert key in scores.uncertainty
    again = megascore.rescore(scores, {"ffn": "taylor"})
    torch.testing.assert_close(again[key], scores[key], rtol=1e-12, atol=0)


def test_what_is_not_finite_is_found_in_its_step(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    folder = save_tokenizer(save_checkpoint(tmp_path / "llama", "llama", num_key_value_heads=4))
    weights = tensors_of(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    job = make_job(tmp_path / "run", model_root)
    only = "scores=[{target: ffn, method: taylor}]"
    shown = world.run(
        2, run_on_rank, job, (only, f"model.hf={folder}", "parallel.pipeline=2", "run.checkpoint_dir=null")
    )
    assert "step 0: what decoder.layers.2.mlp.linear_fc2 gives on rank 1 for ffn/taylor is NaN" in shown[1]
    assert "RankFailure" in shown[0]
    assert not job.output.exists()


def test_layer_by_layer_it_is_refused_by_name(undisturbed: Job) -> None:
    from megascore.job.job import run_job

    config = load_config(undisturbed.config, [SCORES, "run.blockwise=true", "run.steps=0"])
    with pytest.raises(ConfigError, match=r"run\.blockwise=true can't measure ffn/taylor, attention_heads/taylor"):
        run_job(config, Console(file=io.StringIO()))


def test_a_dry_run_says_what_it_costs(undisturbed: Job) -> None:
    from megascore.job.job import run_job

    shown = io.StringIO()
    run_job(load_config(undisturbed.config, [SCORES, "run.steps=0"]), Console(file=shown, width=200))
    assert "For taylor each step takes a further forward pass and a backward one" in shown.getvalue()
    assert "For layers" not in shown.getvalue()
