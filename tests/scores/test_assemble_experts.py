"""Facts that a score file has of routed experts beside their scores."""

from __future__ import annotations

import torch

from megascore.hooks.statistics import State
from megascore.scores.assemble import FEW_TOKENS, Found, assemble_scores
from megascore.scores.ranking import rankings
from megascore.scores.score_file import UNSEEN_VALUE, Scores
from megascore.sites.requests import ScoreRequest

EXPERTS = "decoder.layers.1.mlp.experts/experts/router_weighted_norm"
INSIDE = "decoder.layers.1.mlp.experts.{}.linear_fc2/expert_ffn/l2_norm"
DENSE = "decoder.layers.0.mlp.linear_fc2/ffn/l2_norm"
TOKENS = [FEW_TOKENS, 0, FEW_TOKENS - 1, 501]


def make_scores(*, dense: bool) -> Scores:
    states: dict[str, State] = {
        EXPERTS: {"num_tokens": torch.tensor(sum(TOKENS)), "tokens_per_expert": torch.tensor(TOKENS)},
        **{INSIDE.format(number): {"num_tokens": torch.tensor(count)} for number, count in enumerate(TOKENS)},
    }
    scores = {
        EXPERTS: torch.tensor([3.0, 0.0, 2.0, 1.0]),
        **{INSIDE.format(number): torch.tensor([1.0, 2.0]) for number in range(4)},
    }
    requests = [ScoreRequest("experts", "router_weighted_norm"), ScoreRequest("expert_ffn", "l2_norm")]
    if dense:
        states[DENSE] = {"num_tokens": torch.tensor(360), "num_samples": torch.tensor(9)}
        scores[DENSE] = torch.tensor([1.0])
        requests.append(ScoreRequest("ffn", "l2_norm"))
    return assemble_scores(requests, Found(states, scores), {"model": {"experts_per_token": 2}})


def test_experts_without_tokens_are_unseen_and_have_no_rank() -> None:
    scores = make_scores(dense=True)
    assert scores.unseen == {EXPERTS: [1], INSIDE.format(1): "all"}
    assert scores[EXPERTS].tolist() == [3, UNSEEN_VALUE, 2, 1]
    ranked = {ranking.key: ranking for ranking in rankings(scores)}
    assert ranked[EXPERTS].ascending() == [3, 2, 0]
    assert INSIDE.format(1) not in ranked


def test_tokens_of_each_expert_are_told_and_few_are_marked() -> None:
    sites = make_scores(dense=True).metadata["sites"]
    assert sites[EXPERTS]["tokens_per_expert"] == TOKENS
    assert sites[EXPERTS]["few_tokens"] == [2]
    assert [sites[INSIDE.format(number)]["few_tokens"] for number in range(4)] == [False, False, True, False]
    assert "few_tokens" not in sites[DENSE]


def test_tokens_of_the_run_are_not_those_of_the_routing() -> None:
    metadata = make_scores(dense=True).metadata
    assert (metadata["num_tokens"], metadata["num_samples"]) == (360, 9)
    # Every token goes to two experts; the number of samples cannot be known from them.
    metadata = make_scores(dense=False).metadata
    assert metadata["num_tokens"] == sum(TOKENS) // 2
    assert "num_samples" not in metadata
