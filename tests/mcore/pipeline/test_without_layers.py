"""Scores of layers that take further forward passes: real Megatron modules on every layout against plain loops."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ModelError
from tests.mcore.expert_model import SIZES as EXPERT_SIZES
from tests.mcore.expert_model import Variant
from tests.mcore.oracle import expected_without_layers
from tests.mcore.sites.test_masks import LENGTHS, SEQUENCE_LENGTH, STEPS, make_masks, make_tokens
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

SPAN = 2
METHODS = ("loss_without", "output_error", "span_similarity")
SCORES: list[dict[str, Any]] = [
    {"target": "layers", "method": "loss_without"},
    {"target": "layers", "method": "output_error"},
    {"target": "layers", "method": "span_similarity", "span": SPAN},
    # Hooks of modules, which must not see the further passes.
    {"target": "layers"},
    {"target": "hidden_size"},
]
TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""
TP_SP = {"tensor": 2, "sequence": True}

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {
        "TP=2": {"tensor": 2},
        "TP=2 with sequence parallel": TP_SP,
        "CP=2": {"context": 2},
        "PP=2": {"pipeline": 2},
        "PP=2 uneven": {"pipeline": 2, "pipeline_layers": [1, 3]},
        "PP=2 x VPP=2": {"pipeline": 2, "virtual_pipeline": 2},
        "DP=2": {},
    },
    4: {
        "PP=4": {"pipeline": 4},
        "TP=2 SP x PP=2 x VPP=2": {**TP_SP, "pipeline": 2, "virtual_pipeline": 2},
        "TP=2 SP x CP=2": {**TP_SP, "context": 2},
    },
}
EXPERT_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"EP=2": {"expert": 2}, "PP=2": {"pipeline": 2}},
    4: {"TP=2 SP, EP=2, PP=2": {**TP_SP, "expert": 2, "pipeline": 2}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: Path) -> dict[str | None, dict[str, Tensor]]:
    return {of: world.run(1, compute_expected, of)[0] for of in (str(checkpoint), None)}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_padded_batches_score_as_plain_loops_over_documents(
    world_size: int, world: WorkerPool, checkpoint: Path, expected: dict[str | None, dict[str, Tensor]]
) -> None:
    for by_layout in world.run(world_size, score_on, str(checkpoint), LAYOUTS[world_size]):
        for layout, found in by_layout.items():
            check(layout, found, expected[str(checkpoint)])


@pytest.mark.parametrize("world_size", EXPERT_LAYOUTS)
def test_models_with_experts(world_size: int, world: WorkerPool, expected: dict[str | None, dict[str, Tensor]]) -> None:
    for by_layout in world.run(world_size, score_on, None, EXPERT_LAYOUTS[world_size]):
        for layout, found in by_layout.items():
            check(layout, found, expected[None])


def check(layout: str, found: tuple[dict[str, Tensor], dict[str, Any]], expected: dict[str, Tensor]) -> None:
    scores, unseen = found
    assert unseen == {"decoder/layers/span_similarity": [3]}, layout
    for key, wanted in expected.items():
        num_seen = len(wanted) - (SPAN - 1) * key.endswith("span_similarity")
        # The rise is a difference of sums that are a hundred times as large.
        torch.testing.assert_close(
            scores[key][:num_seen], wanted[:num_seen], rtol=TOLERANCE, atol=1e-11, msg=f"{key} on {layout}"
        )


def test_a_span_of_one_layer_is_block_similarity_and_the_others_are_left_alone(
    world: WorkerPool, checkpoint: Path
) -> None:
    one_layer = [{"target": "layers", "method": "span_similarity", "span": 1}]
    (alone, _), (together, _), (spans, unseen) = world.run(1, score_each, str(checkpoint), one_layer)[0]
    assert unseen == {}
    torch.testing.assert_close(
        spans["decoder/layers/span_similarity"], alone["decoder/layers/block_similarity"], rtol=1e-12, atol=0
    )
    for key, value in alone.items():
        assert torch.equal(together[key], value), key


def test_a_span_longer_than_the_model_is_refused(world: WorkerPool, checkpoint: Path) -> None:
    message = world.run(1, refusal, str(checkpoint), 5)[0]
    assert message == (
        "layers/span_similarity has span=5, but the model has 4 layers: choose a span that is no longer than the model."
    )


def score_on(checkpoint: str | None, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: score(checkpoint, ParallelConfig(**degrees), SCORES) for name, degrees in layouts.items()}


def score_each(checkpoint: str, one_layer: list[dict[str, Any]]) -> list[Any]:
    return [score(checkpoint, ParallelConfig(), scores) for scores in (SCORES[3:], SCORES, one_layer)]


def refusal(checkpoint: str, span: int) -> str:
    with pytest.raises(ModelError) as caught:
        score(checkpoint, ParallelConfig(), [{"target": "layers", "method": "span_similarity", "span": span}])
    return str(caught.value)


def compute_expected(checkpoint: str | None) -> dict[str, Tensor]:
    with in_world(ParallelConfig()):
        [model] = build(checkpoint, ParallelConfig())
        return expected_without_layers(model, make_tokens(vocabulary(checkpoint)), LENGTHS, SPAN)


def score(
    checkpoint: str | None, parallel: ParallelConfig, scores: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from megatron.core import parallel_state

    from megascore.data import micro_batches_of_step
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.pipeline.without_layers import WithoutLayers
    from megascore.mcore.sites.view import MegatronModelView
    from megascore.runs.scoring_run import ScoringRun
    from megascore.sites.requests import resolve_scores

    tokens, masks = make_tokens(vocabulary(checkpoint)), make_masks()
    with in_world(parallel):
        chunks = build(checkpoint, parallel)
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        with ScoringRun(MegatronModelView(chunks), resolve_scores(scores)) as run:
            without_layers = WithoutLayers.of(chunks, run)
            for step in range(len(STEPS)):
                slices = micro_batches_of_step(step, len(tokens), 4, 2 if parallel.virtual_pipeline == 1 else 1, *ranks)
                parts, own_masks = [tokens[part] for part in slices], [masks[part] for part in slices]
                forward_only(chunks, parts, False, own_masks, run)
                if without_layers is not None:
                    without_layers.run(parts, own_masks)
                run.step()
        found = run.finish()
        return dict(found), found.unseen


def in_world(parallel: ParallelConfig) -> Any:
    from megascore.mcore.world.parallel_world import parallel_world

    return parallel_world(parallel, torch.device("cpu"), timedelta(seconds=60))


def build(checkpoint: str | None, parallel: ParallelConfig) -> list[Any]:
    """Return the chunks of a dense model of a checkpoint, or of the model with experts."""
    from megascore.mcore.models.build import load_model
    from tests.mcore.expert_model import build_expert_model

    if checkpoint is None:
        return build_expert_model(parallel, Variant("alltoall"))
    config = ModelConfig(hf=checkpoint, dtype="float64")
    return load_model(config, parallel, torch.device("cpu"), SEQUENCE_LENGTH)


def vocabulary(checkpoint: str | None) -> int:
    return EXPERT_SIZES["vocab"] if checkpoint is None else SIZES["vocab_size"]
