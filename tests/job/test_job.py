"""Whole jobs: `run_job` in one process and on gloo ranks, and what it says of bad input before anything long starts."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import megascore
from megascore.config import DataConfig, load_config
from megascore.errors import ConfigError, DataError, LayoutError, MegascoreError, ModelError, ScoreFileError
from tests.models import SIZES, reference_logits, reference_loss, save_checkpoint, save_tokenizer, tensors_of
from tests.pool import RankErrors, WorkerPool


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{(7 * i * i + i) % 100}" for i in range(200)))
    return path


def run(model: Path, text: Path, output: Path, *overrides: str) -> str:
    """Run a job; return what it showed."""
    from megascore.job.job import run_job

    # Ranks of a world read one each.
    config_file = output.parent / f"job-{os.getpid()}.yaml"
    config_file.write_text(
        f"model: {{hf: '{model}', dtype: float32}}\nscores: minitron\n"
        f"data: {{text: '{text}', sequence_length: 16}}\n"
        f"run: {{output: '{output}', device: cpu, global_batch_size: 4, micro_batch_size: 2, timeout_minutes: 1}}\n"
    )
    shown = io.StringIO()
    run_job(load_config(config_file, overrides), Console(file=shown, width=100))
    return shown.getvalue()


def run_on_rank(model: Path, text: Path, output: Path, *overrides: str) -> str | None:
    """`run`, in a world of the pool; the text of a user's error instead of what was shown."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return run(model, text, output, *overrides)
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"


def test_a_job_writes_scores_and_shows_them(model: Path, text: Path, tmp_path: Path) -> None:
    shown = run(model, text, tmp_path / "scores.safetensors")
    scores = megascore.load_scores(tmp_path / "scores.safetensors")
    metadata = scores.metadata
    assert (metadata["num_samples"], metadata["num_tokens"], metadata["num_steps"]) == (12, 192, 3)
    assert metadata["model"]["name"] == "llama"
    assert len(metadata["weights_fingerprint"]) == len(metadata["data_fingerprint"]) == 64
    assert scores["decoder/layers"].shape == (SIZES["num_hidden_layers"],)
    assert "12/12" in shown or "step 3/3" in shown
    assert "layers by block_similarity" in shown
    # transformers computes in float32 as well: 1e-5 is what its own sums differ by.
    from megascore.data import load_samples

    tokens = load_samples(DataConfig(text=str(text), sequence_length=16), model).tokens
    expected = reference_loss(reference_logits(model, tokens), tokens)
    assert metadata["loss"] == pytest.approx(expected, rel=1e-5)


def test_jobs_on_two_layouts_compare_as_equal(model: Path, text: Path, tmp_path: Path, world: WorkerPool) -> None:
    from megascore.cli import main

    outputs = [tmp_path / "a" / "scores.safetensors", tmp_path / "b" / "scores.safetensors"]
    world.run(1, run_on_rank, model, text, outputs[0])
    world.run(2, run_on_rank, model, text, outputs[1], "parallel.tensor=2", "parallel.sequence=true")
    assert main(["compare", str(outputs[0]), str(outputs[1]), "--tolerance", "1e-5"]) == 0
    layouts = [megascore.load_scores(path).metadata["layout"] for path in outputs]
    assert [layout["tensor"] for layout in layouts] == [1, 2]


def test_a_job_ends_on_all_ranks_when_its_scores_are_sure_enough(
    model: Path, tmp_path: Path, world: WorkerPool
) -> None:
    # Every sample is the same, so that nothing scatters.
    text, output = tmp_path / "words.txt", tmp_path / "scores.safetensors"
    text.write_text(" ".join(f"w{i % 16}" for i in range(16 * 44)))
    settings = ("run.global_batch_size=2", "run.until={overlap: 0.98}", "run.keep_statistics=false")
    told = world.run(2, run_on_rank, model, text, output, *settings)
    assert output.exists(), told
    scores = megascore.load_scores(output)
    assert scores.metadata["num_steps"] == 16
    assert scores.metadata["until"]["reached"]
    assert not scores.statistics
    assert min(own.overlap or 1 for own in scores.uncertainty.values()) > 0.98


def test_a_dry_run_lists_every_site_of_every_stage(model: Path, text: Path, tmp_path: Path, world: WorkerPool) -> None:
    output = tmp_path / "scores.safetensors"
    degrees = ("parallel.tensor=2", "parallel.pipeline=2", "run.steps=0")
    shown = "".join(str(world.run(4, run_on_rank, model, text, output, *degrees)[0]).split())
    for layer in range(SIZES["num_hidden_layers"]):
        assert f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm" in shown
    assert "tp=shard" in shown
    assert "pp=own" in shown
    assert not output.exists()


BAD_INPUT: dict[str, tuple[type[MegascoreError], str, list[str]]] = {
    "no model": (ConfigError, "model.hf is not given", ["model.hf=null"]),
    "missing model": (ModelError, "nowhere", ["model.hf=nowhere"]),
    "no text": (ConfigError, "no data is given: expected one of data.text, data.jsonl", ["data.text=null"]),
    "missing text": (DataError, "text nowhere.txt not found", ["data.text=nowhere.txt"]),
    "text too short for one sample": (DataError, "200 tokens", ["data.sequence_length=100", "data.num_samples=3"]),
    "too many samples asked for": (DataError, "12 samples of 16", ["data.num_samples=13"]),
    "iterations other than the steps": (
        ConfigError,
        "has iterations=5, but the run has 3 steps",
        ["scores=[{target: ffn, method: iterative_contribution, iterations: 5}]"],
    ),
    "sequence longer than the model's": (ModelError, "128 positions", ["data.sequence_length=160"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(case: str, model: Path, text: Path, tmp_path: Path) -> None:
    kind, words, overrides = BAD_INPUT[case]
    with pytest.raises(kind, match=words):
        run(model, text, tmp_path / "scores.safetensors", *overrides)
    assert list(tmp_path.glob("*.safetensors*")) == []


def test_the_wrong_number_of_processes_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="1 processes do not fit the layout parallel.tensor=2"):
        run(model, text, tmp_path / "scores.safetensors", "parallel.tensor=2")


def test_bad_input_in_a_world_is_told_once(model: Path, text: Path, tmp_path: Path, world: WorkerPool) -> None:
    output = tmp_path / "run" / "scores.safetensors"
    too_many = world.run(3, run_on_rank, model, text, output, "parallel.tensor=3")
    assert "tensor sizes that would do: 1, 2" in too_many[0]
    assert [told.split(":")[0] for told in too_many] == ["LayoutError", "RankFailure", "RankFailure"]
    few = world.run(2, run_on_rank, model, text, output, "data.num_samples=1")
    assert "1 samples for 2 data-parallel ranks" in few[0]
    assert not output.exists()


def test_a_checkpoint_without_a_tensor_is_refused_by_name(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = tensors_of(folder / "model.safetensors")
    misshapen = {**tensors, name: tensors[name][:, :-1].contiguous()}
    for broken, words in (
        ({key: value for key, value in tensors.items() if key != name}, f"no tensor '{name}'"),
        (misshapen, f"tensor '{name}' .* has shape \\[64, 95\\], expected \\[64, 96\\]"),
    ):
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            run(folder, text, tmp_path / "scores.safetensors")


def test_a_tokenizer_of_another_model_is_refused(text: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "small", "llama", vocab_size=64)
    save_tokenizer(folder)
    with pytest.raises(DataError, match="gives token 96, but the model small has 64 tokens"):
        run(folder, text, tmp_path / "scores.safetensors")


def test_an_output_that_is_there_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(ScoreFileError, match="overwrite"):
        run(model, text, output)
    assert output.read_bytes() == b"precious"


def test_an_output_folder_that_is_a_file_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoreFileError, match="file"):
        from megascore.job.job import run_job

        config_file = tmp_path / "job.yaml"
        config_file.write_text("run: {device: cpu}")
        overrides = [f"model.hf={model}", f"data.text={text}", "data.sequence_length=16"]
        output = f"run.output={tmp_path / 'file' / 'scores.safetensors'}"
        run_job(load_config(config_file, [*overrides, output]), Console(file=io.StringIO()))


def test_a_failing_rank_stops_all_ranks(model: Path, text: Path, tmp_path: Path, world: WorkerPool) -> None:
    output = tmp_path / "run" / "scores.safetensors"
    with pytest.raises(RankErrors, match="rank 1: RuntimeError: broken on purpose"):
        world.run(2, run_with_a_broken_rank, model, text, output, timeout=60.0)
    assert not output.exists()


def run_with_a_broken_rank(model: Path, text: Path, output: Path) -> None:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import RowParallelLinear

    output.parent.mkdir(parents=True, exist_ok=True)
    forward, calls = RowParallelLinear.forward, []

    def broken(self: Any, *args: Any) -> Any:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 10:
            raise RuntimeError("broken on purpose")
        return forward(self, *args)

    RowParallelLinear.forward = broken
    try:
        run(model, text, output, "parallel.tensor=2")
    finally:
        RowParallelLinear.forward = forward


def test_float16_weights_are_read_in_the_type_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(model, folder)
    halves = {key: value.to(torch.float16) for key, value in tensors_of(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    run(folder, text, tmp_path / "scores.safetensors", "model.dtype=bfloat16", "run.loss=false")
    scores = megascore.load_scores(tmp_path / "scores.safetensors")
    assert scores.metadata["loss"] is None
    assert scores.metadata["model"]["dtype"] == "bfloat16"


def spoiled(model: Path, folder: Path, name: str) -> Path:
    """Return a copy of a checkpoint with a NaN in the first row of a tensor."""
    shutil.copytree(model, folder)
    tensors = {key: value.clone() for key, value in tensors_of(model / "model.safetensors").items()}
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
@pytest.mark.parametrize("one_at_a_time", ["false", "true"])
def test_what_is_not_a_number_ends_the_job_at_its_step(
    parallel: str, one_at_a_time: str, model: Path, text: Path, tmp_path: Path, world: WorkerPool
) -> None:
    bad = spoiled(model, tmp_path / "bad", "model.layers.2.mlp.up_proj.weight")
    output = tmp_path / "run" / "scores.safetensors"
    ranks = world.run(
        2,
        run_on_rank,
        bad,
        text,
        output,
        f"parallel.{parallel}=2",
        f"run.blockwise={one_at_a_time}",
        "run.loss=false",
        "scores=[{target: ffn}]",
        timeout=120.0,
    )
    told = "\n".join(str(rank) for rank in ranks)
    first = "ModelError: step 0: what decoder.layers.2.mlp.linear_fc2 gives on rank "
    assert all(str(rank).startswith(first) for rank in ranks), told
    assert not output.exists()


def test_a_loss_that_is_not_a_number_is_told_and_the_scores_are_kept(text: Path, tmp_path: Path) -> None:
    good = save_tokenizer(save_checkpoint(tmp_path / "good", "llama", tie_word_embeddings=False))
    bad = spoiled(good, tmp_path / "bad", "lm_head.weight")
    output = tmp_path / "scores.safetensors"
    with pytest.warns(UserWarning, match="the loss over .* is nan, while scores are finite"):
        run(bad, text, output)
    scores = megascore.load_scores(output)
    assert scores.metadata["loss"] is None
    assert len(scores)
