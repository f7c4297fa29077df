"""Rankings: who competes with whom, and who goes first."""

from __future__ import annotations

import pytest
import torch

from megascore.errors import ScoreFileError
from megascore.scores.ranking import Ranking, rankings
from megascore.scores.score_file import Scores

HEADS = "decoder.layers.0.self_attention.linear_proj/attention_heads/l2_norm"


def make_ranking(values: list[float], groups: int = 1, unseen: tuple[int, ...] = ()) -> Ranking:
    return Ranking("k/t/m", "k", "t", "m", torch.tensor(values, dtype=torch.float64), groups, frozenset(unseen))


def test_ties_go_by_smaller_index() -> None:
    ranking = make_ranking([2, 1, 1, 0, 1])
    assert ranking.ascending() == [3, 1, 2, 4, 0]
    assert ranking.lowest(0.4) == [3, 1]


def test_groups_are_ranked_one_by_one() -> None:
    ranking = make_ranking([3, 1, 2, 4, 9, 8, 7, 6], groups=2)
    assert ranking.ascending() == [1, 2, 0, 3, 7, 6, 5, 4]
    # The lowest two of all would both be in the first group.
    assert ranking.lowest(0.25) == [1, 7]


def test_less_than_one_entry_is_none() -> None:
    ranking = make_ranking([1, 2, 3, 4, 5, 6, 7, 8, 9], groups=3)
    assert ranking.lowest(0.25) == []
    assert ranking.lowest(0.34) == [0, 3, 6]


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(100, 0.29, 29), (1536, 0.25, 384), (10, 0.99, 9), (7, 1.0, 7)]
)
def test_counts_round_down_but_not_for_rounding_errors(size: int, fraction: float, count: int) -> None:
    assert len(make_ranking([float(i) for i in range(size)]).lowest(fraction)) == count


def test_unseen_entries_have_no_place() -> None:
    ranking = make_ranking([-1, 5, 4, -1], unseen=(0, 3))
    assert ranking.ascending() == [2, 1]
    assert ranking.lowest(0.5) == [2, 1]
    assert ranking.lowest(1.0) == [2, 1]
    assert ranking.measured.tolist() == [5, 4]


def test_a_fraction_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        make_ranking([1]).lowest(1.5)


def test_rankings_of_a_file_are_the_units_that_compete() -> None:
    values = {
        "decoder.layers.0.mlp.linear_fc2/ffn/l2_norm": torch.ones(4),
        HEADS: torch.ones(6),
        "decoder.layers.0.input_layernorm/hidden_size/l2_norm": torch.ones(8),
        "decoder/hidden_size/l2_norm": torch.ones(8),
        "decoder/layers/block_similarity": torch.ones(2),
    }
    found = rankings(Scores(values, {"model": {"num_kv_heads": 2}}, {"decoder/layers/block_similarity": [1]}))
    assert {r.key: r.groups for r in found} == {
        "decoder.layers.0.mlp.linear_fc2/ffn/l2_norm": 1,
        HEADS: 2,
        "decoder/hidden_size/l2_norm": 1,
        "decoder/layers/block_similarity": 1,
    }
    assert {r.key: r.unseen for r in found if r.unseen} == {"decoder/layers/block_similarity": frozenset({1})}


def test_heads_with_kv_heads_of_their_own_compete_across_the_layer() -> None:
    (ranking,) = rankings(Scores({HEADS: torch.tensor([3.0, 1.0, 2.0, 4.0])}, {"model": {"num_kv_heads": 4}}))
    assert ranking.lowest(0.25) == [1]


@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 4}, {"num_kv_heads": 0}])
def test_heads_that_do_not_fit_the_kv_heads_are_refused(model: dict) -> None:
    with pytest.raises(ScoreFileError, match=r"has 6 heads and metadata model\.num_kv_heads"):
        rankings(Scores({HEADS: torch.ones(6)}, {"model": model}))


def test_heads_of_a_layer_that_differs_are_ranked_in_its_own_groups() -> None:
    metadata = {"model": {"num_kv_heads": 2}, "sites": {HEADS: {"groups": 3}}}
    (ranking,) = rankings(Scores({HEADS: torch.ones(6)}, metadata))
    assert ranking.groups == 3
