"""A score in one file, this one: what a class gets by saying what it ranks, with no change in the package.

A channel's variance over tokens times the square of its column's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megascore
from megascore.config import ParallelConfig
from megascore.errors import ConfigError, HookStateError
from megascore.hooks.base import ForwardHook
from megascore.hooks.registry import methods
from megascore.hooks.statistics import State, Statistic
from megascore.hooks.weights import WeightHook, weight_matrix
from megascore.kernels import reductions
from megascore.kernels.exact import exact
from megascore.sites.requests import resolve_scores
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches
from tests.mcore.sites.test_scores_on_every_layout import TOLERANCE, compute_expected_inputs, score
from tests.models import save_checkpoint
from tests.pool import WorkerPool

SCORES: list[dict[str, Any]] = [{"target": "ffn", "method": "spread"}]


class FluctuationHook(
    WeightHook, method="spread", targets=("ffn",), summary="variance of a channel times its column's squared norm"
):
    def __init__(self, linear_layer: nn.Module, activation_hooks_kwargs: Any = None) -> None:
        weight = weight_matrix(linear_layer, "FluctuationHook", may_be_shard=self.takes_shards)
        super().__init__(reductions.column_norms(weight))

    def declare(self, num_channels: int) -> tuple[Statistic, ...]:
        sums = (Statistic(name, (num_channels,), channel_dim=0) for name in ("sum", "sum_of_squares"))
        return (*super().declare(num_channels), *sums)

    @exact
    def observe(self, inputs: Tensor, output: Tensor, token_mask: Tensor | None = None) -> None:
        self._begin_call(inputs, token_mask)
        for (x,), mask in reductions.token_views([inputs], token_mask):
            counted = x.double() if mask is None else x.double().masked_fill(~mask[:, None], 0)
            self._state["sum"] += counted.sum(0)
            self._state["sum_of_squares"] += counted.square().sum(0)

    @classmethod
    def compute(cls, state: State, *, num_calls: float = 1.0) -> dict[str, Tensor]:
        cls._require_data(state)
        mean, mean_square = (state[name] / state["num_tokens"] for name in ("sum", "sum_of_squares"))
        return {"score": state["weight_norm"].square() * (mean_square - mean.square()).clamp(min=0)}


def formula(inputs: Tensor, weight: Tensor) -> Tensor:
    """From all tokens [T, C] and the weight [E, C]."""
    return weight.double().square().sum(0) * inputs.double().var(0, unbiased=False)


@pytest.mark.fast
def test_its_name_is_known_and_another_is_not() -> None:
    [request] = resolve_scores(SCORES)
    assert request.definition.hook is FluctuationHook
    with pytest.raises(ConfigError, match="unknown method of target 'ffn' 'spreads'.*mean 'spread'"):
        resolve_scores([{"target": "ffn", "method": "spreads"}])
    with pytest.raises(ConfigError, match="unknown method of target 'kv_heads' 'spread'"):
        resolve_scores([{"target": "kv_heads", "method": "spread"}])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama"))


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: str) -> dict[str, Tensor]:
    inputs, weights = world.run(1, compute_expected_inputs, checkpoint)[0]
    return {f"{name}/ffn/spread": formula(x, weights[name]) for name, x in inputs.items() if "linear_fc2" in name}


@pytest.mark.parametrize(
    ("world_size", "degrees"),
    [
        (2, {"tensor": 2, "sequence": True}),
        (2, {"context": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2}),
    ],
    ids=["TP=2 SP", "CP=2", "PP=2 x VPP=2", "TP=2 x DP=2"],
)
def test_every_layout_gives_its_formula(
    world_size: int, degrees: dict[str, Any], world: WorkerPool, checkpoint: str, expected: Mapping[str, Tensor]
) -> None:
    for scores in world.run(world_size, score_on_rank, checkpoint, ParallelConfig(**degrees)):
        assert scores.keys() == expected.keys()
        for key, value in scores.items():
            torch.testing.assert_close(value, expected[key], rtol=TOLERANCE["float64"], atol=0, msg=key)


def score_on_rank(checkpoint: str, parallel: ParallelConfig) -> dict[str, Tensor]:
    return score(checkpoint, parallel, "float64", SCORES)


def run_until(folder: Path, stop_after: int | None) -> megascore.Scores | None:
    """Score the tiny model with checkpoints after each step, and stop after one of them."""
    model, batches = TinyDecoder(), make_batches()
    settings: dict[str, Any] = {"total_steps": len(batches), "identity": {"data": "mine"}, "interval": 1}
    with megascore.attach(model, scores=SCORES) as run, megascore.checkpoints(run, folder, **settings) as saver:
        for batch in batches[saver.step :]:
            with torch.no_grad():
                model(batch)
            run.step()
            saver.after_step()
            if run.num_steps == stop_after:
                return None
        return run.finish()


@pytest.mark.fast
def test_it_resumes_at_every_step_is_saved_shown_and_scored_block_by_block(tmp_path: Path) -> None:
    whole = run_until(tmp_path / "whole", None)
    assert whole is not None
    for step in (1, 2):
        assert run_until(tmp_path / f"{step}", step) is None
        resumed = run_until(tmp_path / f"{step}", None)
        assert resumed is not None
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    blockwise = megascore.score_blockwise(TinyDecoder(), None, make_batches(), SCORES)
    assert list(blockwise) == list(whole)
    for key, value in whole.items():
        # float64: only the order of additions differs.
        torch.testing.assert_close(blockwise[key], value, rtol=1e-9, atol=0)
    whole.save(tmp_path / "scores.safetensors")
    loaded = megascore.load_scores(tmp_path / "scores.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in whole.items())


@pytest.mark.fast
def test_two_classes_cannot_claim_one_name_nor_rank_what_is_no_target() -> None:
    class Other(FluctuationHook, method="spread", targets=("ffn",), summary="another"): ...

    with pytest.raises(ConfigError, match="FluctuationHook and .*Other both say that they rank 'ffn' by 'spread'"):
        methods()
    del Other.measures

    class Misspelt(FluctuationHook, method="variance", targets=("fnn",), summary="another"): ...

    with pytest.raises(ConfigError, match="its method 'variance' ranks 'fnn', which is no target. Known: ffn, "):
        resolve_scores(SCORES)
    del Misspelt.measures
    with pytest.raises(TypeError, match="Nameless has targets, a summary or options, but names no method"):

        class Nameless(FluctuationHook, targets=("ffn",), summary="nothing"): ...

    with pytest.raises(TypeError, match="Nothing names its method 'nothing', and must say its targets"):

        class Nothing(ForwardHook, method="nothing"): ...


@pytest.mark.fast
def test_a_state_is_its_own() -> None:
    hook = FluctuationHook(nn.Linear(4, 3))
    with pytest.raises(HookStateError, match="'IndependentChannelContributionHook' there, 'FluctuationHook' here"):
        hook.load_state_dict(megascore.hooks.IndependentChannelContributionHook(nn.Linear(4, 3)).state_dict())


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    def define() -> type[ForwardHook]:
        class Again(FluctuationHook, method="again", targets=("ffn",), summary="as in a notebook"): ...

        return Again

    first, second = define(), define()
    assert methods()["ffn", "again"].hook is second
    for defined in (first, second):
        del defined.measures
