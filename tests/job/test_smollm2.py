"""A real model: SmolLM2-135M on the shipped text, TP=3, against transformers and against a float64 oracle."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch import smollm2
from megascore.config import DataConfig, ModelConfig, ParallelConfig
from megascore.data import load_samples
from tests.mcore.oracle import Recorder, expected_scores
from tests.mcore.order import assert_same_order
from tests.models import reference_logits, reference_loss
from tests.pool import WorkerPool
from tests.smaller import random_plan

TEXT = Path(smollm2.__file__).parent / "text" / "northanger_abbey.txt"
CPU = torch.device("cpu")
SEQUENCE_LENGTH, NUM_SAMPLES = 48, 3
TOLERANCE = 1e-4
"""float32 against float64, through 30 layers."""


@pytest.fixture(scope="module")
def model() -> Path:
    folder = smollm2.default_folder()
    smollm2.convert_once(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path) -> Tensor:
    data = DataConfig(text=str(TEXT), sequence_length=SEQUENCE_LENGTH, num_samples=NUM_SAMPLES)
    return load_samples(data, model).tokens


def test_tp3_with_sequence_parallel_gives_the_scores_of_one_process(
    world: WorkerPool, model: Path, tokens: Tensor
) -> None:
    expected = world.run(1, compute_expected, model, tokens, timeout=300.0)[0]
    loss = reference_loss(reference_logits(model, tokens), tokens)
    for sequence in (False, True):
        parallel = ParallelConfig(tensor=3, sequence=sequence)
        for scores, own_loss in world.run(3, score_and_loss, model, tokens, parallel, timeout=300.0):
            assert own_loss == pytest.approx(loss, abs=1e-3)
            assert scores.keys() == expected.keys()
            for key, score in scores.items():
                torch.testing.assert_close(score, expected[key], rtol=TOLERANCE, atol=0, msg=key)
                assert_same_order(score, expected[key], TOLERANCE, key)


def compute_expected(model: Path, tokens: Tensor) -> dict[str, Tensor]:
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(ParallelConfig(), CPU, timedelta(minutes=5)):
        chunks = load_model(ModelConfig(hf=str(model), dtype="float64"), ParallelConfig(), CPU, SEQUENCE_LENGTH)
        recorder = Recorder(chunks[0])
        forward_only(chunks, [tokens], compute_loss=False)
        return expected_scores(recorder, num_layers=30, head_dim=64)


def score_and_loss(model: Path, tokens: Tensor, parallel: ParallelConfig) -> tuple[dict[str, Tensor], float]:
    import megascore
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    with parallel_world(parallel, CPU, timedelta(minutes=5)):
        chunks = load_model(ModelConfig(hf=str(model), dtype="float32"), parallel, CPU, SEQUENCE_LENGTH)
        with megascore.attach(chunks, recipe="minitron") as run:
            losses = forward_only(chunks, [tokens], compute_loss=True)
            run.step()
        return dict(run.finish()), float(losses.nats) / losses.num_tokens


def test_a_smaller_one_loads_in_transformers_and_keeps_what_random_channels_would_lose(
    model: Path, tokens: Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import megascore

    parent = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad(), megascore.attach(parent, recipe="minitron") as run:
        parent(tokens)
        run.step()
    scores = run.finish()
    wanted = {"ffn": "75%", "layers": 26, "hidden_size": "90%", "multiple_of.hidden_size": 9}
    plan = megascore.plan(scores, model=model, same_weights=True, **wanted)
    assert plan.sizes_after["hidden_size"] == 522
    megascore.prune(model, plan, tmp_path / "smaller")
    smaller, found = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", output_loading_info=True)
    assert not any(found.values())
    assert sum(weight.numel() for weight in smaller.parameters()) == plan.after.parameters
    losses = {}
    for name, units in {"scores": plan, "random": random_plan(model, **wanted)}.items():
        with torch.no_grad(), megascore.masked_units(parent, units):
            losses[name] = reference_loss(parent(tokens).logits, tokens)
    with torch.no_grad():
        own = reference_loss(smaller(tokens).logits, tokens)
    assert own == pytest.approx(losses["scores"], abs=1e-3)
    # Units at random cost nats, not tenths of one.
    assert own < losses["random"] - 1
