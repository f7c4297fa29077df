"""The random score: a floor that depends on nothing but its seed and the names of modules."""

from __future__ import annotations

import pytest
import torch

import megascore
from megascore.errors import ConfigError
from megascore.sites.requests import resolve_scores
from megascore.sites.targets import TARGETS
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches

pytestmark = pytest.mark.fast


def random_scores(seed: int, batches: int = 2) -> megascore.Scores:
    model = TinyDecoder()
    scores = [{"target": t, "method": "random", "seed": seed} for t in ("ffn", "layers", "hidden_size", "kv_heads")]
    with megascore.attach(model, scores=scores) as run, torch.no_grad():
        for batch in make_batches(batches):
            model(batch)
            run.step()
    return run.finish()


def test_it_is_the_same_for_the_same_seed_whatever_the_data_and_another_for_each_layer() -> None:
    first, again, other = random_scores(1), random_scores(1, batches=3), random_scores(2)
    assert first.keys() == again.keys() == other.keys()
    for key, values in first.items():
        assert torch.equal(again[key], values)
        assert not torch.equal(other[key], values)
    one, two = (first[f"decoder.layers.{number}.mlp.linear_fc2/ffn"] for number in range(2))
    assert not torch.equal(one, two)
    assert first.uncertainty["decoder/layers/random"].standard_error.max() == 0


def test_it_ranks_every_target_and_takes_whole_seeds_only() -> None:
    requests = resolve_scores([{"target": target, "method": "random"} for target in TARGETS])
    assert len(requests) == len(TARGETS)
    with pytest.raises(ConfigError, match="seed of method 'random' is 0.5: expected a whole number"):
        resolve_scores([{"target": "ffn", "method": "random", "seed": 0.5}])
