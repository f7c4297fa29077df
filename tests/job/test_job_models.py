"""Whole jobs on models with experts, Megatron checkpoints and models that a function builds. Tier: gloo processes."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import megascore
from megascore.config import ModelConfig, ParallelConfig
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import parallel_world
from tests.job.test_job import run_on_rank
from tests.mcore import providers
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.models import save_checkpoint, save_tokenizer
from tests.pool import WorkerPool

CPU = torch.device("cpu")
EXPERT_SCORES = (
    "scores=[{target: experts}, {target: expert_ffn}, {target: ffn}, {target: hidden_size}, {target: layers}]"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{(7 * i * i + i) % 100}" for i in range(200)))
    return path


def make(folder: Path, family: str) -> Path:
    save_tokenizer(save_checkpoint(folder, family))
    return folder


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", ["parallel.expert=2"]),
        ("mixtral", ["parallel.expert_tensor=2"]),
        ("mixtral", ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"]),
    ],
)
def test_scores_of_a_model_with_experts_do_not_depend_on_where_they_are(
    family: str, layout: list[str], text: Path, tmp_path: Path, world: WorkerPool
) -> None:
    from megascore.cli import main

    model = make(tmp_path / family, family)
    scores = EXPERT_SCORES if family == "qwen3_moe" else EXPERT_SCORES.replace("{target: ffn}, ", "")
    settings = (scores, "model.dtype=float64")
    outputs = [tmp_path / "a" / "scores.safetensors", tmp_path / "b" / "scores.safetensors"]
    world.run(1, run_on_rank, model, text, outputs[0], *settings)
    told = world.run(2, run_on_rank, model, text, outputs[1], *settings, *layout)
    assert outputs[1].exists(), told
    assert main(["compare", str(outputs[0]), str(outputs[1]), "--tolerance", "1e-6"]) == 0
    found = megascore.load_scores(outputs[1])
    assert found["decoder.layers.2.mlp.experts/experts"].shape == ((8,) if family == "qwen3_moe" else (4,))
    assert found.metadata["num_tokens"] == 192


@pytest.mark.parametrize(("family", "has_ffn"), [("mixtral", False), ("qwen3_moe", True), ("llama", True)])
def test_the_recipe_scores_what_the_model_has(family: str, has_ffn: bool, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.safetensors"
    told = run_on_rank(make(tmp_path / family, family), text, output, "scores=minitron")
    assert output.exists(), told
    targets = {key.split("/")[1] for key in megascore.load_scores(output)}
    experts = set() if family == "llama" else {"experts", "expert_ffn"}
    ffn = {"ffn"} if has_ffn else set()
    assert targets == {"attention_heads", "hidden_size", "layers"} | experts | ffn


def test_samples_that_ranks_with_experts_cannot_share_evenly_are_refused(
    text: Path, tmp_path: Path, world: WorkerPool
) -> None:
    model, output = make(tmp_path / "mixtral", "mixtral"), tmp_path / "run" / "scores.safetensors"
    for axis in ("expert", "expert_tensor"):
        settings = (EXPERT_SCORES, f"parallel.{axis}=2", "data.num_samples=11")
        told = world.run(2, run_on_rank, model, text, output, *settings, timeout=30.0)
        assert "11 samples in steps of 4 do not split evenly over 2 data-parallel ranks" in told[0]


def save(model: Path, folder: Path) -> None:
    parallel = ParallelConfig(tensor=2)
    with parallel_world(parallel, CPU, timedelta(minutes=1)):
        chunks = load_model(ModelConfig(hf=str(model), dtype="float32"), parallel, CPU, 16)
        save_torch_dist(chunks, folder, args=training_args(model))


def run_with_checkpoint(checkpoint: Path, model: Path, text: Path, output: Path, *overrides: str) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(providers.CHECKPOINT, str(checkpoint))
        return run_on_rank(model, text, output, *overrides)


def test_a_job_on_a_megatron_checkpoint_or_a_function_scores_the_same_model(
    text: Path, tmp_path: Path, world: WorkerPool
) -> None:
    model = make(tmp_path / "llama", "llama")
    world.run(2, save, model, tmp_path / "megatron" / "iter_0000002")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("2")
    # Only the config and the tokenizer are left of the Hugging Face directory: the weights must come from elsewhere.
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tokenizer / name)
    expected = tmp_path / "a" / "scores.safetensors"
    world.run(1, run_on_rank, model, text, expected, "parallel.pipeline=1")
    for name, overrides in {
        "load": [f"model.load={tmp_path / 'megatron'}", "parallel.pipeline=2"],
        "provider": ["model.provider=tests.mcore.providers:whole", "parallel.tensor=2"],
    }.items():
        output = tmp_path / name / "scores.safetensors"
        told = world.run(2, run_with_checkpoint, model, tokenizer, text, output, *overrides)
        assert output.exists(), told
        found, wanted = megascore.load_scores(output), megascore.load_scores(expected)
        for site in wanted:
            # Sums in float32 in another order.
            torch.testing.assert_close(found[site], wanted[site], rtol=1e-5, atol=1e-7)
        assert found.metadata["loss"] == pytest.approx(wanted.metadata["loss"], rel=1e-6)
        assert found.metadata["weights_fingerprint"] != wanted.metadata["weights_fingerprint"]


def test_a_function_whose_weights_nobody_can_tell_is_not_checkpointed(text: Path, tmp_path: Path) -> None:
    model, output = make(tmp_path / "llama", "llama"), tmp_path / "run" / "scores.safetensors"
    function = ("model.provider=tests.mcore.providers:whole", f"run.checkpoint_dir={tmp_path / 'kept'}")
    told = run_with_checkpoint(model, model, text, output, *function)
    assert told is not None
    assert told.startswith("ConfigError: run.checkpoint_dir is given, but nothing tells which weights model.provider")
    assert not (tmp_path / "kept").exists()
    run_with_checkpoint(model, model, text, output, *function, "model.fingerprint=first")
    assert megascore.load_scores(output).metadata["weights_fingerprint"] == "first"
    told = run_with_checkpoint(model, model, text, output, *function, "model.fingerprint=second", "run.overwrite=true")
    assert told is not None
    assert "model.weights_fingerprint is 'first' there, 'second' here" in told


def test_a_checkpoint_alone_has_no_tokenizer_for_text(text: Path, tmp_path: Path, world: WorkerPool) -> None:
    model = make(tmp_path / "llama", "llama")
    world.run(2, save, model, tmp_path / "ck")
    output = tmp_path / "run" / "scores.safetensors"
    overrides = (f"model.load={tmp_path / 'ck'}", "model.hf=null", "parallel.tensor=2")
    told = world.run(2, run_on_rank, model, text, output, *overrides)
    assert "ConfigError: data.tokenizer is not given" in told[0]
    assert told[1].startswith("RankFailure")


def test_a_bad_checkpoint_is_told_on_every_rank_without_waiting(text: Path, tmp_path: Path, world: WorkerPool) -> None:
    model = make(tmp_path / "llama", "llama")
    world.run(2, save, model, tmp_path / "ck")
    (tmp_path / "ck" / "__1_0.distcp").unlink()
    output = tmp_path / "run" / "scores.safetensors"
    told = world.run(2, run_on_rank, model, text, output, f"model.load={tmp_path / 'ck'}", timeout=30.0)
    assert "__1_0.distcp not found" in told[0]
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "intermediate_size": 100}))
    world.run(2, save, make(tmp_path / "other", "llama"), tmp_path / "ck2")
    told = world.run(2, run_on_rank, model, text, output, f"model.load={tmp_path / 'ck2'}", timeout=30.0)
    assert "has shape [4, 192, 64], expected [4, 200, 64]" in told[0]
