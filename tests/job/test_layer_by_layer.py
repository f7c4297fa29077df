"""Whole jobs that run one layer at a time: the scores and the loss of a full pass, on every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megascore.config import load_config
from megascore.errors import ConfigError
from megascore.runs.steps import Cursor
from tests.job.resumable import NUM_STEPS, SAMPLES_OF_STEP, Job, assert_same_scores, make_job, run_on_rank
from tests.models import save_checkpoint, save_tokenizer
from tests.pool import WorkerPool

BLOCKWISE = "run.blockwise=true"
TOLERANCE = 1e-9
"""The model is in float64: what is left is the rounding of sums in another order, divided by small scores."""

NUM_SAMPLES = NUM_STEPS * SAMPLES_OF_STEP - 1
"""The last step is short, and gives two data-parallel ranks different numbers of samples."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP 2 and SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "CP 2": (2, ("parallel.context=2",)),
    "DP 2, other micro-batches": (2, ("run.micro_batch_size=2",)),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "PP 2, uneven": (2, ("parallel.pipeline=2", "parallel.pipeline_layers=[3,1]")),
    "PP 2 x VPP 2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "TP 2 x PP 2": (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2")),
}

EVERYTHING = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    "parallel.expert=2",
    "parallel.pipeline=2",
    "parallel.virtual_pipeline=2",
)


def make(folder: Path, model_root: Path) -> Job:
    job = make_job(folder, model_root)
    job.config.write_text(
        job.config.read_text().replace("sequence_length: 16}", f"sequence_length: 16, num_samples: {NUM_SAMPLES}}}")
    )
    return job


@pytest.fixture(scope="module")
def full_pass(model_root: Path, tmp_path_factory: pytest.TempPathFactory, world: WorkerPool) -> Job:
    job = make(tmp_path_factory.mktemp("full") / "run", model_root)
    world.run(1, run_on_rank, job)
    assert job.output.exists()
    return job


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_by_layer_gives_the_scores_of_a_full_pass(
    layout: str, full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make(tmp_path / "run", model_root)
    world_size, overrides = LAYOUTS[layout]
    shown = world.run(world_size, run_on_rank, job, (BLOCKWISE, *overrides))
    assert job.output.exists(), shown
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer has no experts, which the others have."""
    folder = save_checkpoint(tmp_path_factory.mktemp("experts") / "qwen3_moe", "qwen3_moe")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lengths = (20, 3, 16, 1, 9, 12, 2, 5)
    texts = [" ".join(f"w{(7 * i * i + i + length) % 100}" for i in range(length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def expert_job(folder: Path, model: Path, documents: Path) -> Job:
    folder.mkdir()
    job = Job(folder)
    scores = ["experts", "expert_ffn", "ffn", "layers", "hidden_size", "attention_heads"]
    sections = {
        "model": {"hf": str(model), "dtype": "float64"},
        "data": {"jsonl": str(documents), "packing": False, "sequence_length": 16},
        "scores": [{"target": target} for target in scores],
        "run": {"output": str(job.output), "device": "cpu", "global_batch_size": 4},
    }
    job.config.write_text(json.dumps(sections))
    return job


def test_experts_and_padded_documents_come_out_as_in_a_full_pass(
    experts: Path, documents: Path, tmp_path: Path, world: WorkerPool
) -> None:
    full = expert_job(tmp_path / "full", experts, documents)
    world.run(1, run_on_rank, full)
    for name, world_size, overrides in (
        ("one", 1, ()),
        ("EP 2", 2, ("parallel.expert=2",)),
        ("TP 2, EP 2, VPP 2", 4, EVERYTHING),
    ):
        job = expert_job(tmp_path / name, experts, documents)
        shown = world.run(world_size, run_on_rank, job, (BLOCKWISE, *overrides))
        assert job.output.exists(), (name, shown)
        assert_same_scores(job.scores(), full.scores(), TOLERANCE)
        assert job.scores().unseen == full.scores().unseen


def see_layers_on_rank(job: Job, overrides: tuple[str, ...]) -> list[list[int]]:
    """Return, for each step of a layer of this rank, the numbers of the layers whose weights are there."""
    seen = []

    def look(cursor: Cursor) -> None:
        layers = [layer for chunk in cursor.modules for layer in chunk.decoder.layers]
        present = [layer for layer in layers if not any(weight.is_meta for weight in layer.parameters())]
        seen.append([layer.layer_number - 1 for layer in present])

    run_on_rank(job, (BLOCKWISE, *overrides), look)
    return [present for present in seen if present]


def test_only_the_layer_that_runs_has_its_weights(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    job = make(tmp_path / "run", model_root)
    ranks = world.run(2, see_layers_on_rank, job, ("parallel.pipeline=2",))
    assert ranks == [[[layer]] * NUM_STEPS + [[layer + 1]] * NUM_STEPS for layer in (0, 2)]


def run_with_spool_on_rank(job: Job, overrides: tuple[str, ...]) -> tuple[str, int, int]:
    """Return what was shown, and how many tensors were put into the spool in memory, and in files."""
    from megascore.capture.stores import SpoolStore

    put, counts = SpoolStore.put, [0, 0]

    def counted(store: Any, key: str, tensor: Any) -> None:
        put(store, key, tensor)
        counts[key in store._files] += 1

    SpoolStore.put = counted  # type: ignore[method-assign]
    try:
        return run_on_rank(job, (BLOCKWISE, *overrides)), counts[0], counts[1]
    finally:
        SpoolStore.put = put  # type: ignore[method-assign]


def test_what_waits_between_layers_goes_into_the_spool_folder(
    full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job, spool = make(tmp_path / "run", model_root), tmp_path / "spool"
    ranks = world.run(2, run_with_spool_on_rank, job, ("parallel.pipeline=2", f"run.spool_dir={spool}"))
    assert all(in_memory == 0 and in_files > 0 for _, in_memory, in_files in ranks), ranks
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)
    assert list(spool.iterdir()) == [], "a run leaves nothing behind"

    # Room for the hidden states of some micro-batches, [16, 1, 64] in float64 each.
    other = make(tmp_path / "other", model_root)
    some = (f"run.spool_dir={spool}", "run.spool_memory_gb=5e-5")
    assert all(count > 0 for count in world.run(1, run_with_spool_on_rank, other, some)[0][1:])
    assert_same_scores(other.scores(), full_pass.scores(), TOLERANCE)


def test_a_spool_folder_that_can_not_be_made_stops_the_job(model_root: Path, tmp_path: Path, world: WorkerPool) -> None:
    job = make(tmp_path / "run", model_root)
    (tmp_path / "file").write_text("")
    told = world.run(2, run_on_rank, job, (BLOCKWISE, f"run.spool_dir={tmp_path / 'file'}"))
    assert "DataError: spool folder" in told[0]
    assert "RankFailure" in told[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.spool_dir=/spool"], "run.spool_dir is given without run.blockwise=true"),
        (["run.blockwise=true", "run.spool_memory_gb=1"], "run.spool_memory_gb is given without run.spool_dir"),
        (["run.blockwise=true", "run.spool_dir=/spool", "run.spool_memory_gb=-1"], "expected 0 or more"),
        (
            ["run.blockwise=true", "run.spool_dir=/spool", "run.spool_memory_gb=.inf"],
            "is inf: expected .* finite",
        ),
        (["run.timeout_minutes=.inf"], "run.timeout_minutes is inf: expected a positive, finite number"),
        (["run.timeout_minutes=.nan"], "run.timeout_minutes is nan: expected a positive, finite number"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    overrides: list[str], message: str, model_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(make(tmp_path / "run", model_root).config, overrides)


def lose_weights_on_rank(job: Job) -> str:
    """Run while the checkpoint's file is taken away after the first layer."""
    file = job.folder / "model" / "model.safetensors"

    def lose(cursor: Cursor) -> None:
        if cursor.block == 1:
            file.unlink(missing_ok=True)

    return run_on_rank(job, (BLOCKWISE, f"model.hf={job.folder / 'model'}"), lose)


def test_weights_that_are_gone_when_it_is_their_turn_end_all_ranks_and_lose_nothing(
    full_pass: Job, model_root: Path, tmp_path: Path, world: WorkerPool
) -> None:
    job = make(tmp_path / "run", model_root)
    shutil.copytree(model_root / "llama", job.folder / "model")
    told = world.run(2, lose_weights_on_rank, job)
    assert "ModelError" in told[0]
    assert "RankFailure: reading the weights of layer 1 failed on rank 0" in told[1]
    shutil.copy(model_root / "llama" / "model.safetensors", job.folder / "model")
    shown = world.run(1, run_on_rank, job, (BLOCKWISE, f"model.hf={job.folder / 'model'}"))
    assert "megascore-step-00000000-block-0001.safetensors, block 1" in shown[0]
    assert_same_scores(job.scores(), full_pass.scores(), TOLERANCE)
