"""Scores computed again from the statistics in a file: equal to those of a run that asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megascore
from megascore.cli import main
from megascore.errors import ConfigError, ScoreFileError
from megascore.sites.requests import resolve_scores
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches

pytestmark = pytest.mark.fast

NUM_BATCHES = 6
EXACT = {"rtol": 1e-12, "atol": 1e-14}
"""The same sums, in another order."""


def run_scores(scores: Any, batches: list[Tensor], **metadata: Any) -> megascore.Scores:
    model = TinyDecoder()
    with megascore.attach(model, scores=scores, metadata=metadata) as run, torch.no_grad():
        for batch in batches:
            model(batch)
            run.step()
    return run.finish()


@pytest.fixture(scope="module")
def everything() -> megascore.Scores:
    return run_scores("all", make_batches(NUM_BATCHES))


def names(scores: megascore.Scores) -> set[tuple[str, str]]:
    return {(target, method) for target, method in (key.split("/")[1:] for key in scores)}


def assert_close(found: megascore.Scores, wanted: megascore.Scores) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **EXACT, msg=key)
        error = wanted.uncertainty[key]
        torch.testing.assert_close(found.uncertainty[key].standard_error, error.standard_error, rtol=1e-6, atol=1e-12)
        assert found.uncertainty[key].overlap == error.overlap


def test_one_pass_keeps_what_all_methods_need(everything: megascore.Scores) -> None:
    for request in resolve_scores("all"):
        if "expert" not in request.target:
            assert (request.target, request.method) in names(everything)
    one_by_one = [
        run_scores([{"target": target, "method": method}], make_batches(NUM_BATCHES))
        for target, method in sorted(names(everything))
    ]
    alone = {key: value for scores in one_by_one for key, value in scores.items()}
    assert alone.keys() == everything.keys()
    for key, value in alone.items():
        torch.testing.assert_close(everything[key], value, **EXACT, msg=key)


def test_a_method_that_was_not_asked_for_comes_from_the_file(everything: megascore.Scores, tmp_path: Path) -> None:
    asked = [{"target": t, "method": m} for t in ("ffn", "attention_heads") for m in ("wanda", "fluctuation")]
    run_scores(asked, make_batches(NUM_BATCHES)).save(tmp_path / "s")
    wanted = ["ffn=variance", "ffn=weight_norm", "ffn=l2_l2", "attention_heads=variance"]
    assert main(["rescore", str(tmp_path / "s"), *wanted, "--to", str(tmp_path / "more")]) == 0
    more = megascore.load_scores(tmp_path / "more")
    expected = {("ffn", "variance"), ("ffn", "weight_norm"), ("ffn", "l2_l2"), ("attention_heads", "variance")}
    assert names(more) == expected | {(entry["target"], entry["method"]) for entry in asked}
    for key, value in more.items():
        torch.testing.assert_close(value, everything[key], **EXACT, msg=key)
    assert "ffn/variance" in more.metadata["scores"]
    assert set(more) <= set(more.metadata["sites"])


def test_a_method_whose_statistics_are_missing_is_refused_by_name() -> None:
    scores = run_scores([{"target": "ffn"}, {"target": "layers"}], make_batches(2))
    with pytest.raises(
        ScoreFileError, match=r"ffn/wanda needs statistics.*\(sum_of_squares, weight_norm\).*scores: all"
    ):
        megascore.rescore(scores, {"ffn": "wanda"})
    with pytest.raises(ScoreFileError, match="kv_heads/independent_contribution needs statistics that are not in"):
        megascore.rescore(scores, {"kv_heads": "independent_contribution"})
    with pytest.raises(ScoreFileError, match="ffn/iterative_contribution can't be computed from statistics"):
        megascore.rescore(scores, [{"target": "ffn", "method": "iterative_contribution", "iterations": 2}])
    with pytest.raises(ConfigError, match="unknown method of target 'ffn' 'wnda'"):
        megascore.rescore(scores, {"ffn": "wnda"})


def test_two_files_merge_to_the_run_over_both(everything: megascore.Scores) -> None:
    batches = make_batches(NUM_BATCHES)
    parts = [run_scores("all", batches[:4], loss=2.0), run_scores("all", batches[4:], loss=5.0)]
    merged = megascore.merge(parts)
    assert merged.keys() == everything.keys()
    for key, value in everything.items():
        torch.testing.assert_close(merged[key], value, **EXACT, msg=key)
    assert [merged.metadata[name] for name in ("num_tokens", "num_samples", "num_steps")] == [
        everything.metadata[name] for name in ("num_tokens", "num_samples", "num_steps")
    ]
    tokens = [part.metadata["num_tokens"] for part in parts]
    assert merged.metadata["loss"] == pytest.approx((2.0 * tokens[0] + 5.0 * tokens[1]) / sum(tokens))
    assert [part["num_steps"] for part in merged.metadata["merged"]] == [4, 2]


def test_what_is_not_one_model_or_other_data_does_not_merge() -> None:
    one, other = make_batches(2), make_batches(4)[2:]
    first = run_scores([{"target": "ffn", "method": "wanda"}], one, data_fingerprint="a", weights_fingerprint="w")
    same = run_scores([{"target": "ffn", "method": "wanda"}], other, data_fingerprint="a", weights_fingerprint="w")
    with pytest.raises(ScoreFileError, match="score files 1 and 2 are of the same data .a.*count twice"):
        megascore.merge([first, same])
    other_weights = run_scores([{"target": "ffn", "method": "wanda"}], other, weights_fingerprint="v")
    with pytest.raises(
        ScoreFileError, match="file 2 can't be merged.*weights_fingerprint is 'v' there, 'w' in the first"
    ):
        megascore.merge([first, other_weights])
    with pytest.raises(ScoreFileError, match="it has the scores ffn/l2_norm, the first ffn/wanda"):
        megascore.merge([first, run_scores([{"target": "ffn"}], other, weights_fingerprint="w")])
    with pytest.raises(ScoreFileError, match="1 score files are no two"):
        megascore.merge([first])
    iterative = [{"target": "ffn", "method": "iterative_contribution", "iterations": 2}]
    with pytest.raises(ScoreFileError, match="keeps no statistics"):
        megascore.merge([run_scores(iterative, one), run_scores(iterative, other)])


def test_a_file_gives_back_statistics_and_uncertainty(everything: megascore.Scores, tmp_path: Path) -> None:
    everything.save(tmp_path / "s")
    loaded = megascore.load_scores(tmp_path / "s")
    assert loaded == everything
    assert loaded.statistics.keys() == everything.statistics.keys()
    assert_close(loaded, everything)
