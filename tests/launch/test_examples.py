"""The embedding examples run as they are, and give the scores of a plain run."""

from __future__ import annotations

import importlib
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import megascore
from megascore.errors import Preempted
from tests.models import save_checkpoint
from tests.pool import WorkerPool

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
TOLERANCE = 2e-5
"""The models are in float32, and sums over tensor-parallel ranks round otherwise."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("examples") / "llama", "llama"))


def example(name: str) -> ModuleType:
    """Import an example as Python does when it is started: its folder is on the path."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    if name not in ("hugging_face", "attach_again"):
        # First of all, as it imports Megatron quietly: a warning would be an error here.
        importlib.import_module("megascore.mcore")
    return importlib.import_module(name)


def run_example(name: str, *arguments: str) -> None:
    example(name).main(*arguments)


def score_plainly(checkpoint: str, scores: list[dict[str, Any]] | None) -> dict[str, Tensor]:
    """Score with Megatron on one process, in this package's own loop."""
    from megascore.config import ModelConfig, ParallelConfig
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    cpu, demo = torch.device("cpu"), example("demo")
    with parallel_world(ParallelConfig(), cpu, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float32"), ParallelConfig(), cpu, demo.SEQUENCE_LENGTH)
        with megascore.attach(chunks, scores=scores, recipe=None if scores else "minitron") as run:
            for batch in demo.batches(chunks[0].vocab_size):
                forward_only(chunks, list(batch.split(1)), compute_loss=False)
                run.step()
        return dict(run.finish())


def assert_same(path: Path, expected: dict[str, Tensor]) -> megascore.Scores:
    scores = megascore.load_scores(path)
    assert set(scores) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(
            scores[key], value, rtol=TOLERANCE, atol=0, msg=lambda text, key=key: f"{key}: {text}"
        )
    return scores


@pytest.mark.parametrize(
    ("name", "scores", "layout"),
    [
        ("own_schedule", None, "pipeline"),
        ("megatron_loop", [{"target": "ffn"}, {"target": "kv_heads"}, {"target": "layers"}], "tensor"),
    ],
)
def test_megatron_loops_score_as_a_plain_run(
    name: str, scores: list[dict[str, Any]] | None, layout: str, world: WorkerPool, checkpoint: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    world.run(2, run_example, name, checkpoint, str(path))
    result = assert_same(path, world.run(1, score_plainly, checkpoint, scores)[0])
    assert result.metadata["layout"][layout] == 2
    assert result.metadata["num_steps"] == example("demo").NUM_STEPS


def test_a_hugging_face_run_goes_on_with_another_number_of_processes(
    world: WorkerPool, checkpoint: str, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    world.run(1, run_example, "hugging_face", checkpoint, str(whole))
    texts = world.run(2, run_until_preempted, checkpoint, str(stopped))
    assert all("stopped by SIGTERM after step 1" in text for text in texts)
    assert not stopped.exists()
    world.run(1, run_example, "hugging_face", checkpoint, str(stopped))
    scores = assert_same(stopped, dict(megascore.load_scores(whole)))
    assert scores.metadata["num_samples"] == 12


@pytest.mark.parametrize("name", ["attach_again", "hugging_face", "megatron_loop", "own_schedule"])
def test_an_example_says_how_it_is_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert "OUTPUT" in shown
    assert "Scoring" in shown or "scoring" in shown


def run_until_preempted(checkpoint: str, output: str) -> str:
    """Run the example with a SIGTERM to one rank in the middle of the first step."""
    import os
    import signal

    import torch.distributed as dist

    from megascore.runs.scoring_run import ScoringRun

    step = ScoringRun.step

    def with_signal(run: ScoringRun) -> None:
        step(run)
        if run.num_steps == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ScoringRun.step = with_signal  # type: ignore[method-assign]
    try:
        run_example("hugging_face", checkpoint, output)
    except Preempted as error:
        return str(error)
    finally:
        ScoringRun.step = step  # type: ignore[method-assign]
    return "finished"


def test_a_model_is_scored_again_and_keeps_its_own_hooks(checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    seen = example("attach_again").main(checkpoint, str(path))
    # Its own hook saw both passes, and no other.
    assert len(seen) == 2
    first, second = megascore.load_scores(path), megascore.load_scores(tmp_path / "scores-heads.safetensors")
    assert {key.split("/")[1] for key in second} == {"kv_heads"}
    assert not set(first) & set(second)
    assert first.metadata["num_tokens"] == second.metadata["num_tokens"] == 4 * 32
