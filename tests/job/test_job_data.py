"""Whole jobs on padded documents and on token ids: every layout gives what the documents alone give."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import megascore
from megascore.config import DataConfig, load_config
from megascore.data import load_samples
from megascore.errors import DataError, MegascoreError
from tests.models import load_with_transformers, reference_logits
from tests.pool import WorkerPool

LENGTHS = (20, 3, 16, 1, 9, 12, 2, 5, 30, 7)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "TP=2 with sequence parallel": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP=2 x VPP=2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "CP=2 x DP=2": (4, ["parallel.context=2"]),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    texts = [" ".join(f"w{(7 * i * i + i + length) % 100}" for i in range(length)) for length in LENGTHS]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(model: Path, output: Path, data: dict[str, Any], *overrides: str) -> str | None:
    """Run a job on a rank; return the text of a user's error."""
    from megascore.job.job import run_job

    output.parent.mkdir(parents=True, exist_ok=True)
    config_file = output.parent / f"job-{os.getpid()}.yaml"
    sections = {
        "model": {"hf": str(model), "dtype": "float64"},
        "data": {"sequence_length": 16, **data},
        "run": {"output": str(output), "device": "cpu", "global_batch_size": 4, "micro_batch_size": 2, "seed": 5},
    }
    config_file.write_text(json.dumps(sections))
    try:
        run_job(load_config(config_file, overrides), Console(file=io.StringIO(), width=100))
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_padded_documents_score_and_predict_on_every_layout_as_they_do_alone(
    model: Path, documents: Path, tmp_path: Path, world: WorkerPool
) -> None:
    results = {}
    data = {"jsonl": str(documents), "packing": False}
    for layout, (world_size, degrees) in LAYOUTS.items():
        output = tmp_path / layout / "scores.safetensors"
        assert world.run(world_size, run, model, output, data, *degrees) == [None] * world_size
        results[layout] = megascore.load_scores(output)
    alone, loss, num_tokens = score_alone(model, documents)
    first = results["one process"]
    for layout, scores in results.items():
        metadata = scores.metadata
        assert (metadata["num_tokens"], metadata["num_samples"]) == (num_tokens, len(LENGTHS)), layout
        assert metadata["data_fingerprint"] == first.metadata["data_fingerprint"]
        # transformers rounds its rotary angles, and its norms, to float32.
        assert metadata["loss"] == pytest.approx(loss, rel=1e-5), layout
        assert scores.keys() == alone.keys()
        for key, score in scores.items():
            # Layouts differ in the order of additions only.
            torch.testing.assert_close(score, first[key], rtol=1e-9, atol=0, msg=f"{key} on {layout}")
            torch.testing.assert_close(score, alone[key], rtol=1e-5, atol=0, msg=f"{key} on {layout} and alone")
    assert first.metadata["data"] == {
        "jsonl": "documents.jsonl", "field": "text", "packing": False, "sequence_length": 16, "seed": 5,
    }  # fmt: skip


def score_alone(model: Path, documents: Path) -> tuple[megascore.Scores, float, int]:
    """Run each document without padding through transformers: scores, loss per predicted token, number of tokens."""
    samples = load_samples(DataConfig(jsonl=str(documents), packing=False, sequence_length=16), model, seed=5)
    assert samples.masks is not None
    rows = [row[None, : int(mask.sum())] for row, mask in zip(samples.tokens, samples.masks, strict=True)]
    assert sorted(row.shape[1] for row in rows) == sorted(min(16, length) for length in LENGTHS)
    plain = load_with_transformers(model, torch.float64, attn_implementation="eager")
    nats, num_predicted = 0.0, 0
    with megascore.attach(plain) as scoring:
        for row in rows:
            plain(row)
            scoring.step()
    for row in rows:
        logits = reference_logits(model, row, torch.float64)[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        num_predicted += len(logits)
    return scoring.finish(), nats / num_predicted, sum(row.shape[1] for row in rows)


def test_token_ids_need_no_tokenizer_and_are_checked_against_the_vocabulary(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights alone"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model / name)
    np.save(tmp_path / "ids.npy", np.arange(96, dtype=np.uint16).reshape(6, 16))
    data = {"tokens": str(tmp_path / "ids.npy")}
    assert run(folder, tmp_path / "scores.safetensors", data) is None
    metadata = megascore.load_scores(tmp_path / "scores.safetensors").metadata
    assert metadata["num_tokens"] == 96
    assert metadata["data"] == {"tokens": "ids.npy", "packing": True, "sequence_length": 16, "seed": 5}
    np.save(tmp_path / "ids.npy", np.full(96, 128))
    told = run(folder, tmp_path / "other.safetensors", data)
    assert told is not None
    assert told.startswith(DataError.__name__)
    assert "ids.npy gives token 128, but the model weights alone has 128 tokens" in told


def test_documents_that_predict_nothing_have_no_loss(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "w1"}\n' * 4)
    data = {"jsonl": str(tmp_path / "short.jsonl"), "packing": False}
    assert run(model, tmp_path / "scores.safetensors", data) is None
    assert megascore.load_scores(tmp_path / "scores.safetensors").metadata["loss"] is None
