"""First-order Taylor scores: real Megatron modules, forward and backward on every layout, against derivatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ParallelConfig
from megascore.errors import ModelError
from tests.mcore.oracle import expected_taylor
from tests.mcore.pipeline.test_without_layers import EXPERT_LAYOUTS, LAYOUTS, build, in_world, vocabulary
from tests.mcore.sites.test_masks import LENGTHS, STEPS, make_masks, make_tokens
from tests.models import save_checkpoint
from tests.pool import WorkerPool

SCORES: list[dict[str, Any]] = [
    *({"target": target, "method": "taylor"} for target in ("ffn", "attention_heads", "layers")),
    # A hook of modules, which must not see the further passes.
    {"target": "layers"},
]
TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: Path) -> dict[str | None, dict[str, Tensor]]:
    return {of: world.run(1, compute_expected, of)[0] for of in (str(checkpoint), None)}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_padded_batches_score_as_derivatives_of_documents(
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


def check(layout: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() == {key for key in found if key.endswith("/taylor")}, layout
    for key, wanted in expected.items():
        torch.testing.assert_close(found[key], wanted, rtol=TOLERANCE, atol=1e-15, msg=f"{key} on {layout}")


def test_weights_are_left_as_they_were(world: WorkerPool, checkpoint: Path) -> None:
    assert world.run(1, asks_of_weights, str(checkpoint))[0] == [(True, None), (False, None), (True, None)]


def test_a_model_that_passes_no_gradients_on_is_refused(world: WorkerPool, checkpoint: Path) -> None:
    message = world.run(1, refusal, str(checkpoint))[0]
    assert "decoder.layers.0.mlp.linear_fc2/ffn/taylor has 0" in message
    assert "the model does not pass gradients on there" in message


def compute_expected(checkpoint: str | None) -> dict[str, Tensor]:
    with in_world(ParallelConfig()):
        [model] = build(checkpoint, ParallelConfig())
        head_dim = model.config.kv_channels
        return expected_taylor(model, make_tokens(vocabulary(checkpoint)), LENGTHS, head_dim)


def score_on(checkpoint: str | None, layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, degrees in layouts.items():
        parallel = ParallelConfig(**degrees)
        with in_world(parallel):
            found[name] = score(build(checkpoint, parallel), vocabulary(checkpoint), parallel)
    return found


def asks_of_weights(checkpoint: str) -> list[Any]:
    with in_world(ParallelConfig()):
        [chunk] = build(checkpoint, ParallelConfig())
        weights = list(chunk.parameters())[:3]
        for number, weight in enumerate(weights):
            weight.requires_grad_(number != 1)
        score([chunk], vocabulary(checkpoint), ParallelConfig())
        return [(weight.requires_grad, weight.grad) for weight in weights]


def refusal(checkpoint: str) -> str:
    with in_world(ParallelConfig()):
        [chunk] = build(checkpoint, ParallelConfig())
        chunk.decoder.layers[3].register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}),
            with_kwargs=True,
        )
        with pytest.raises(ModelError) as caught:
            score([chunk], vocabulary(checkpoint), ParallelConfig())
    return str(caught.value)


def score(chunks: list[Any], vocabulary_size: int, parallel: ParallelConfig) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    from megascore.data import micro_batches_of_step
    from megascore.mcore.pipeline.gradients import GradientPasses
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.sites.view import MegatronModelView
    from megascore.runs.scoring_run import ScoringRun
    from megascore.sites.requests import resolve_scores

    tokens, masks = make_tokens(vocabulary_size), make_masks()
    ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    with ScoringRun(MegatronModelView(chunks), resolve_scores(SCORES)) as run:
        gradients = GradientPasses.of(chunks, run)
        assert gradients is not None
        for step in range(len(STEPS)):
            slices = micro_batches_of_step(step, len(tokens), 4, 2 if parallel.virtual_pipeline == 1 else 1, *ranks)
            parts, own_masks = [tokens[part] for part in slices], [masks[part] for part in slices]
            forward_only(chunks, parts, False, own_masks, run)
            gradients.run(parts, own_masks)
            run.step()
    return dict(run.finish())
