"""Whole jobs with scores of layers that take further passes: in any split, gone on with, refused, planned."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import megascore
from megascore.config import load_config
from megascore.errors import ConfigError, ScoreFileError
from tests.job.resumable import Job, assert_same_scores, copy_of, make_job, run_and_stop_on_rank, run_on_rank
from tests.models import save_checkpoint, save_tokenizer, tensors_of
from tests.pool import WorkerPool

SCORES = (
    "scores=[{target: layers}, {target: layers, method: loss_without}, {target: layers, method: output_error}, "
    "{target: layers, method: span_similarity, span: 2}]"
)
KEYS = [f"decoder/layers/{name}" for name in ("block_similarity", "loss_without", "output_error", "span_similarity")]
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order."""


@pytest.fixture(scope="module")
def undisturbed(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "run", model_root)
    shown = world.run(1, run_on_rank, job, (SCORES, "run.micro_batch_size=4"))
    assert job.output.exists(), shown
    return job


def test_a_job_measures_each_of_them(undisturbed: Job) -> None:
    scores = undisturbed.scores()
    assert list(scores) == KEYS
    assert scores.unseen == {KEYS[-1]: [3]}
    sites = scores.metadata["sites"]
    tokens = {key: site["num_tokens"] for key, site in sites.items()}
    assert {tokens[f"decoder.layers.{layer}/layers/loss_without"] for layer in range(4)} == {
        scores.metadata["num_tokens"]
    }


@pytest.mark.parametrize("overrides", [("parallel.pipeline=2",), ("run.micro_batch_size=2",)], ids=["PP 2", "DP 2"])
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


def test_what_is_not_finite_is_found_in_its_step(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    folder = save_tokenizer(save_checkpoint(tmp_path / "llama", "llama", num_key_value_heads=4))
    weights = tensors_of(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    job = make_job(tmp_path / "run", model_root)
    for scores in (SCORES, "scores=[{target: layers, method: loss_without}]"):
        overrides = (scores, f"model.hf={folder}", "parallel.pipeline=2", "run.checkpoint_dir=null")
        for shown in world.run(2, run_on_rank, job, overrides):
            assert "ModelError: step 0: what decoder.layers.2 gives" in shown or "RankFailure" in shown, shown


def test_layer_by_layer_they_are_refused_by_name(undisturbed: Job) -> None:
    from megascore.job.job import run_job

    config = load_config(undisturbed.config, [SCORES, "run.blockwise=true", "run.steps=0"])
    with pytest.raises(
        ConfigError, match=r"run\.blockwise=true can't measure layers/loss_without, layers/output_error"
    ):
        run_job(config, Console(file=io.StringIO()))


def test_a_dry_run_says_what_they_cost(undisturbed: Job) -> None:
    from megascore.job.job import run_job

    shown = io.StringIO()
    run_job(load_config(undisturbed.config, [SCORES, "run.steps=0"]), Console(file=shown, width=200))
    assert (
        "For loss_without, output_error, span_similarity each step takes about 2.5 further forward passes"
        in shown.getvalue()
    )


def test_files_of_two_texts_merge_to_the_run_over_both(
    undisturbed: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    words = (model_root / "words.txt").read_text().split()
    parts = []
    for number in range(2):
        text = tmp_path / f"{number}.txt"
        text.write_text(" ".join(words[number * len(words) // 2 : (number + 1) * len(words) // 2]))
        job = make_job(tmp_path / str(number), model_root)
        shown = world.run(1, run_on_rank, job, (SCORES, f"data.text={text}"))
        assert job.output.exists(), shown
        parts.append(job.scores())
    merged, whole = megascore.merge(parts), undisturbed.scores()
    assert merged.keys() == whole.keys()
    assert merged.unseen == whole.unseen
    for key, value in whole.items():
        torch.testing.assert_close(merged[key], value, rtol=TOLERANCE, atol=0, msg=key)
        assert key in merged.uncertainty, key
    again = megascore.rescore(merged, {"layers": "span_similarity"})
    assert torch.equal(again[KEYS[-1]], merged[KEYS[-1]])


def test_files_of_other_spans_do_not_merge(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    parts = []
    for span in (1, 2):
        job = make_job(tmp_path / str(span), model_root)
        asked = f"scores=[{{target: layers, method: span_similarity, span: {span}}}]"
        shown = world.run(1, run_on_rank, job, (asked, f"data.num_samples={4 * span}"))
        assert job.output.exists(), shown
        parts.append(job.scores())
    with pytest.raises(ScoreFileError, match="span of decoder.layers.0/layers/span_similarity is another"):
        megascore.merge(parts)
