"""Jobs that run one layer at a time from a Megatron checkpoint, or a model that a function builds."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ModelError
from megascore.job.layer_weights import build_for_blocks, whole_because
from megascore.job.resolved import ModelForm
from megascore.mcore.models.build import load_model
from megascore.mcore.models.choose import model_source
from megascore.mcore.world.parallel_world import parallel_world
from megascore.runs.steps import Cursor
from tests.job.resumable import Job, assert_same_scores, run_on_rank
from tests.job.test_layer_by_layer import (
    BLOCKWISE,
    EVERYTHING,
    LAYOUTS,
    TOLERANCE,
    documents,
    expert_job,
    experts,
    full_pass,
    make,
)
from tests.job.test_layer_by_layer_resume import stop_on_rank
from tests.mcore.providers import CHECKPOINT
from tests.mcore.torch_dist import save_torch_dist, training_args
from tests.old_versions import needs_parts_of_files
from tests.pool import WorkerPool

__all__ = ["documents", "experts", "full_pass"]

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=1)


def save_on_rank(directory: Path, folder: Path, parallel: ParallelConfig) -> None:
    """Load a Hugging Face checkpoint and save it as Megatron does."""
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(directory), dtype="float64"), parallel, CPU, 16)
        save_torch_dist(chunks, folder, args=training_args(directory))


@pytest.fixture(scope="module")
def megatron(model_root: Path, full_pass: Job, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Path:
    """The model of `full_pass` as Megatron has saved it, with tied embeddings, from a layout that no test runs."""
    layout = ParallelConfig(tensor=2, pipeline=2, pipeline_layers=[1, 3])
    folder = tmp_path_factory.mktemp("megatron") / "saved"
    world.run(4, save_on_rank, model_root / "llama", folder, layout)
    return folder


def run_and_watch_on_rank(job: Job, overrides: Sequence[str]) -> tuple[str, bool, int, int]:
    """Run; return what was shown, whether only one layer had weights at a time, bytes read, and bytes of the model."""
    from megascore.mcore.models import load_torch_dist as load

    seen, chunks, num_read = [], [], 0
    fill = load.fill_from_part

    def counted(*arguments: Any) -> int:
        nonlocal num_read
        num_bytes = fill(*arguments)
        num_read += num_bytes
        return num_bytes

    def look(cursor: Cursor) -> None:
        chunks[:] = cursor.modules
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        seen.append(sum(not any(weight.is_meta for weight in layer.parameters()) for layer in layers))

    load.fill_from_part = counted
    try:
        shown = run_on_rank(job, overrides, look)
    finally:
        load.fill_from_part = fill
    num_bytes = sum(weight.nbytes for chunk in chunks for weight in chunk.parameters())
    return shown, max(seen, default=0) == 1, num_read, num_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_megatron_checkpoint_is_read_layer_by_layer(
    layout: str, megatron: Path, full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make(tmp_path / "run", model_root)
    world_size, overrides = LAYOUTS[layout]
    both = (BLOCKWISE, f"model.load={megatron}", *overrides)
    for shown, one_by_one, num_read, num_bytes in world.run(world_size, run_and_watch_on_rank, job, both):
        assert one_by_one, shown
        assert num_read == num_bytes
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)


def test_a_megatron_checkpoint_goes_on_in_another_layout(
    megatron: Path, full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make(tmp_path / "run", model_root)
    # Nothing but the checkpoint says what model it is.
    load = (f"model.load={megatron}", "model.hf=null", f"data.tokenizer={model_root / 'llama'}")
    told = world.run(2, stop_on_rank, job, 2, 1, (*load, *LAYOUTS["TP 2 and SP"][1]))
    assert all("Preempted: stopped by SIGTERM after block 2" in text for text in told), told
    shown = world.run(2, run_on_rank, job, (BLOCKWISE, *load, "parallel.pipeline=2", "parallel.virtual_pipeline=2"))
    assert "megascore-step-00000000-block-0002.safetensors, block 2" in shown[0]
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)


@needs_parts_of_files
def test_experts_of_a_megatron_checkpoint_are_read_layer_by_layer(
    experts: Path, documents: Path, tmp_path: Path, world: WorkerPool
) -> None:
    full = expert_job(tmp_path / "full", experts, documents)
    world.run(1, run_on_rank, full)
    megatron = tmp_path / "megatron"
    world.run(2, save_on_rank, experts, megatron, ParallelConfig(tensor=2, sequence=True, expert=2))
    for name, world_size, overrides in (
        ("one", 1, ()),
        ("ETP 2", 2, ("parallel.expert_tensor=2",)),
        ("TP 2, EP 2, VPP 2", 4, EVERYTHING),
    ):
        job = expert_job(tmp_path / name, experts, documents)
        both = (BLOCKWISE, f"model.load={megatron}", *overrides)
        for shown, one_by_one, num_read, num_bytes in world.run(world_size, run_and_watch_on_rank, job, both):
            assert job.output.exists(), (name, shown)
            assert (one_by_one, num_read) == (True, num_bytes), name
        assert_same_scores(job.scores(), full.scores(), TOLERANCE)
        assert job.scores().unseen == full.scores().unseen


def job_of_function(folder: Path, model: dict[str, str], tokens: Path) -> Job:
    """Write the config of a job whose model a function builds."""
    folder.mkdir()
    job = Job(folder)
    sections = {
        "model": {"dtype": "float32", **model},
        "data": {"tokens": str(tokens), "sequence_length": 16},
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": 2},
    }
    job.config.write_text(json.dumps(sections))
    return job


def run_with_provider_on_rank(job: Job, checkpoint: Path, overrides: tuple[str, ...]) -> tuple[str, bool, str]:
    """Return what was shown, whether only one layer had weights at a time, and what was warned of."""
    warned, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(warned)
    logging.getLogger("megascore").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CHECKPOINT, str(checkpoint))
            shown, one_by_one, *_ = run_and_watch_on_rank(job, overrides)
        return shown, one_by_one, warned.getvalue()
    finally:
        logging.getLogger("megascore").removeHandler(handler)


@pytest.mark.parametrize(
    ("function", "loads", "warning"),
    [
        ("whole", False, "all weights of the model are on cpu at first, as the function in model.provider puts all"),
        ("model_provider", True, ""),
    ],
)
def test_models_of_a_function_are_scored_layer_by_layer(
    function: str, loads: bool, warning: str, saved: Path, tmp_path: Path, world: WorkerPool
) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(4 * 16).reshape(4, 16) % 128)
    model = {"provider": f"tests.mcore.providers:{function}"}
    if loads:
        model["load"] = str(saved / "ck")
    jobs = []
    for name, world_size, overrides in (("full", 1, ()), ("blockwise", 2, (BLOCKWISE,))):
        job = job_of_function(tmp_path / name, model, tokens)
        told = world.run(world_size, run_with_provider_on_rank, job, saved / "hf", overrides)
        assert job.output.exists(), told
        jobs.append(job)
    # What the function has not put in itself comes layer by layer; else the job says so, once.
    assert [one_by_one for _, one_by_one, _ in told] == [loads] * 2
    assert warning in told[0][2]
    assert bool(told[0][2]) is not loads
    assert not told[1][2]
    # Layers compute the same numbers either way, and the sums of scores are in float64.
    assert_same_scores(jobs[1].scores(), jobs[0].scores(), 1e-6)


def run_and_take_warnings_on_rank(job: Job, checkpoint: Path, overrides: tuple[str, ...]) -> list[str]:
    """Run; return what was warned of uneven data."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setenv(CHECKPOINT, str(checkpoint))
        run_on_rank(job, overrides)
    assert job.output.exists()
    return [text for text in (str(warning.message) for warning in told) if "has seen" in text]


@pytest.mark.parametrize("way", ["full pass", "layer by layer"])
def test_a_module_that_runs_twice_in_a_pass_is_warned_of_by_one_rank(
    way: str, saved: Path, tmp_path: Path, world: WorkerPool
) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(4 * 16).reshape(4, 16) % 128)
    overrides = (BLOCKWISE, "parallel.pipeline=2") if way == "layer by layer" else ("parallel.pipeline=2",)
    told = {}
    for function in ("whole", "running_twice"):
        job = job_of_function(tmp_path / function, {"provider": f"tests.mcore.providers:{function}"}, tokens)
        told[function] = world.run(2, run_and_take_warnings_on_rank, job, saved / "hf", overrides)
    assert told["whole"] == [[], []]
    (text,), none = told["running_twice"]
    assert text.startswith("decoder.layers.0.mlp.linear_fc2 has seen 128 tokens, decoder.")
    assert none == []


def test_a_function_that_moves_its_model_is_told_not_to(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKPOINT, str(saved / "hf"))
    model = ModelConfig(provider="tests.mcore.providers:moved", load=str(saved / "ck"), dtype="float32")
    form = ModelForm(ParallelConfig(), torch.float32, CPU, 16)
    with parallel_world(form.parallel, CPU, TIMEOUT):
        assert load_model(model, form.parallel, CPU, 16)
        with pytest.raises(ModelError, match="providers:moved asks for weights of layers, or moves them, .* let the"):
            build_for_blocks(model_source(model), form)


def test_layers_of_another_kind_are_said_to_be_there_at_once(saved: Path) -> None:
    source = model_source(ModelConfig(load=str(saved / "ck"), dtype="float32"))
    with parallel_world(ParallelConfig(), CPU, TIMEOUT):
        (chunk,) = source.build(ParallelConfig(), torch.float32, CPU, 16)
        assert whole_because(source, [chunk]) is None
        chunk.decoder.layers[1] = torch.nn.Linear(2, 2)
        assert whole_because(source, [chunk]) == "it has layers that are no TransformerLayer: Linear"
