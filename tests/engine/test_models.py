"""Whole models of Transformer Engine's layers: loaded, run layer by layer, and with units masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megascore
from megascore.config import ParallelConfig
from tests.engine.layers import on_megatrons_own_layers
from tests.job import test_compensate
from tests.job.resumable import Job, assert_same_scores, run_on_rank
from tests.masks.test_layouts import HEADS, MODELS, Case, logits_of
from tests.mcore.logits import relative_difference, run_one
from tests.mcore.pipeline import test_gradients
from tests.models import reference_logits, save_checkpoint
from tests.pool import WorkerPool
from tests.smaller import exact, random_plan

SEQUENCE_LENGTH = 16
TP_SP: dict[str, Any] = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, dict[str, tuple[int, ParallelConfig]]] = {
    "llama": {"one process": (1, ParallelConfig()), "tensor, sequence": (2, ParallelConfig(**TP_SP))},
    "qwen3": {"pipeline": (2, ParallelConfig(pipeline=2))},
    "qwen3_moe": {
        "expert": (2, ParallelConfig(expert=2)),
        "expert tensor": (2, ParallelConfig(**TP_SP, expert_tensor=2)),
    },
}
MASKED = {
    "dense": {"tensor, sequence": (2, ParallelConfig(**TP_SP))},
    "experts": {
        "one process": (1, ParallelConfig()),
        "expert": (2, ParallelConfig(expert=2)),
        "expert tensor": (2, ParallelConfig(**TP_SP, expert_tensor=2)),
    },
}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (4, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", LAYOUTS)
def test_logits_of_a_checkpoint_are_those_of_transformers(
    family: str, engine: WorkerPool, tokens: Tensor, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / family, family)
    expected = reference_logits(checkpoint, tokens)
    own = engine.run(1, on_megatrons_own_layers, run_one, checkpoint, ParallelConfig(), tokens)[0].logits
    for layout, (world_size, parallel) in LAYOUTS[family].items():
        ranks = engine.run(world_size, run_one, checkpoint, parallel, tokens)
        having = [rank.logits for rank in ranks if rank.logits is not None]
        assert having
        for logits in having:
            # transformers computes in float32: 4 layers of its rounding.
            assert relative_difference(logits, expected) < 5e-6, layout
            # The router takes its softmax in float32: a sum in another order may round it to the next number.
            assert relative_difference(logits, own) < (1e-7 if family == "qwen3_moe" else 1e-12), layout


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, layouts in MASKED.items() for layout in layouts])
def test_masks_and_the_pruned_folder_agree(
    name: str, layout: str, engine: WorkerPool, tokens: Tensor, tmp_path: Path
) -> None:
    family, wanted = MODELS[name]
    parent = save_checkpoint(tmp_path / "parent", family, **HEADS)
    plan = random_plan(parent, **wanted)
    megascore.prune(parent, plan, tmp_path / "pruned")
    with torch.no_grad():
        expected = exact(tmp_path / "pruned")(tokens).logits
    world_size, parallel = MASKED[name][layout]
    case = Case(parent, plan, tmp_path / "pruned", expected)
    for masked, pruned, same in engine.run(world_size, logits_of, case, parallel, tokens):
        assert same
        assert masked is not None
        masked = masked[-len(tokens) :]
        # The router's softmax is in float32, here over fewer experts.
        assert float((masked - pruned).abs().max()) < (5e-7 if name == "experts" else 1e-9)
        # transformers and Megatron-Core compute rotary angles and softmax in float32.
        assert float((masked - expected).abs().max()) < 5e-6


SCORES = [{"target": target} for target in ("ffn", "attention_heads", "hidden_size", "layers", "experts", "expert_ffn")]
# These read weights, which are there only while a layer runs.
SCORES += [{"target": target, "method": "wanda"} for target in ("ffn", "attention_heads", "expert_ffn")]


def make_job(folder: Path, checkpoint: Path, tokens: Path) -> Job:
    folder.mkdir()
    job = Job(folder)
    sections = {
        "model": {"hf": str(checkpoint), "dtype": "float64"},
        "data": {"tokens": str(tokens), "sequence_length": SEQUENCE_LENGTH},
        "scores": [score for score in SCORES if "expert" not in score["target"] or "moe" in checkpoint.name],
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": 4, "timeout_minutes": 1},
    }
    job.config.write_text(json.dumps(sections))
    return job


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3", ("parallel.tensor=2", "parallel.sequence=true")),
        ("qwen3_moe", ("parallel.pipeline=2",)),
        ("qwen3_moe", ("parallel.expert=2",)),
    ],
)
def test_layer_by_layer_gives_the_scores_of_a_full_pass_of_megatrons_own_layers(
    family: str, overrides: tuple[str, ...], engine: WorkerPool, tmp_path: Path
) -> None:
    import numpy as np

    checkpoint = save_checkpoint(tmp_path / family, family)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 128, (8, SEQUENCE_LENGTH)))
    full, by_layer = (make_job(tmp_path / name, checkpoint, tmp_path / "tokens.npy") for name in ("full", "by_layer"))
    told = engine.run(1, on_megatrons_own_layers, run_on_rank, full)
    assert full.output.exists(), told
    told = engine.run(2, run_on_rank, by_layer, ("run.blockwise=true", *overrides))
    assert by_layer.output.exists(), told
    # In float64, but for the router's softmax.
    assert_same_scores(by_layer.scores(), full.scores(), 1e-6 if family == "qwen3_moe" else 1e-9)


def test_gradients_pass_through_as_through_megatrons_own_layers(engine: WorkerPool, tmp_path: Path) -> None:
    """No weight asks for a gradient: what is scored by derivatives is in between."""
    checkpoint = str(save_checkpoint(tmp_path / "llama", "llama"))
    expected = engine.run(1, on_megatrons_own_layers, test_gradients.compute_expected, checkpoint)[0]
    layouts: dict[str, dict[str, Any]] = {"TP=2 SP": TP_SP, "PP=2": {"pipeline": 2}, "TP=2": {"tensor": 2}}
    for found in engine.run(2, test_gradients.score_on, checkpoint, layouts):
        for layout, scores in found.items():
            test_gradients.check(layout, scores, expected)


@pytest.mark.parametrize(
    ("family", "wanted", "overrides"),
    [
        ("qwen3", {"hidden_size": 56, "ffn": 72, "layers": 3}, ("parallel.tensor=2", "parallel.sequence=true")),
        ("mixtral", {"attention_heads": 2, "experts": 3, "expert_ffn": 56}, ("parallel.expert=2",)),
    ],
)
def test_projections_are_fitted_as_with_megatrons_own_layers(
    family: str, wanted: dict[str, int], overrides: tuple[str, ...], engine: WorkerPool, tmp_path: Path
) -> None:
    test_compensate.make_files(tmp_path, family, {}, **wanted)
    fit = test_compensate.compensate_on_rank
    assert engine.run(1, on_megatrons_own_layers, fit, tmp_path, "own") == [None]
    assert engine.run(2, fit, tmp_path, "engine", overrides) == [None, None]
    expected = test_compensate.weights_of(tmp_path / "own")
    found = test_compensate.weights_of(tmp_path / "engine")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], **test_compensate.TOLERANCE, msg=name)
