"""Two score files side by side."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from megascore.scores.compare import compare, largest_relative_difference, render_comparison, spearman_correlation
from megascore.scores.score_file import Scores

FFN = "decoder.layers.{}.mlp.linear_fc2/ffn/l2_norm"


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_scores(values: dict[str, torch.Tensor], unseen: dict | None = None, **metadata: object) -> Scores:
    return Scores(values, metadata, unseen)


def test_relative_differences_are_elementwise_and_symmetric() -> None:
    a, b = vector(0, 1, 100), vector(0, 2, 99)
    assert largest_relative_difference(a, b) == largest_relative_difference(b, a) == 0.5
    assert largest_relative_difference(vector(0), vector(1e-300)) == 1.0
    assert largest_relative_difference(vector(), vector()) == 0.0


def test_spearman_is_what_the_hand_computes() -> None:
    # Ranks 1 2.5 2.5 4 and 1 3 2 4: centred products 4.5, squares 4.5 and 5.
    ties = spearman_correlation(vector(1, 2, 2, 3), vector(10, 30, 20, 40))
    assert ties == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5, rel=1e-12)
    # The textbook form without ties: 1 - 6 * sum(d^2) / (n (n^2 - 1)), d = 0 1 -1 1 -1.
    plain = spearman_correlation(vector(1, 2, 3, 4, 5), vector(1, 3, 2, 5, 4))
    assert plain == pytest.approx(1 - 6 * 4 / (5 * 24), rel=1e-12)


def test_spearman_sees_order_only() -> None:
    a = vector(3, 1, 2, 7)
    assert spearman_correlation(a, a.exp()) == pytest.approx(1.0, abs=1e-12)
    assert spearman_correlation(a, -a) == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(vector(), vector()), (vector(1), vector(2)), (vector(1, 1), vector(1, 2))])
def test_spearman_is_none_where_it_is_not_defined(a: torch.Tensor, b: torch.Tensor) -> None:
    assert spearman_correlation(a, b) is None


def test_equal_files_are_within_no_tolerance_at_all() -> None:
    scores = make_scores({FFN.format(0): vector(1, 2, 3, 4), "decoder/layers/block_similarity": vector(0.5)})
    comparison = compare(scores, scores)
    assert comparison.within(0.0)
    assert comparison.largest_difference == 0
    assert [site.overlap for site in comparison.sites] == [1.0, None]
    assert comparison.notes == ()


def test_differences_of_every_kind_are_found() -> None:
    a = make_scores({FFN.format(0): vector(1, 2, 3, 4), "decoder/hidden_size/l2_norm": vector(1, 2)})
    b = make_scores({FFN.format(0): vector(4, 2, 3, 1), "decoder/hidden_size/l2_norm": vector(1, 2.002)})
    ffn, hidden = compare(a, b).sites
    assert ffn.largest_difference == 0.75
    # Ranks 1 2 3 4 against 4 2 3 1: 1 - 6 * 18 / 60.
    assert ffn.correlation == pytest.approx(-0.8, rel=1e-12)
    assert ffn.overlap == 0.0
    assert hidden.largest_difference == pytest.approx(0.002 / 2.002, rel=1e-9)
    assert not compare(a, b).within(0.7)
    assert compare(a, b).within(0.75)


def test_parts_of_a_sum_rank_nothing_and_have_no_overlap() -> None:
    scores = make_scores({"decoder.layers.0.input_layernorm/hidden_size/l2_norm": vector(1, 2, 3, 4)})
    assert compare(scores, scores).sites[0].overlap is None


def test_a_site_in_one_file_only_is_never_within() -> None:
    a = make_scores({FFN.format(0): vector(1), FFN.format(1): vector(1)})
    b = make_scores({FFN.format(0): vector(1), FFN.format(2): vector(1)})
    comparison = compare(a, b)
    assert comparison.mismatches == (f"{FFN.format(1)}: only in A", f"{FFN.format(2)}: only in B")
    assert not comparison.within(1.0)


def test_other_lengths_are_never_within() -> None:
    comparison = compare(make_scores({FFN.format(0): vector(1)}), make_scores({FFN.format(0): vector(1, 2)}))
    assert comparison.mismatches == (f"{FFN.format(0)}: 1 scores in A, 2 in B",)
    assert comparison.sites == ()
    assert not comparison.within(1.0)


def test_unseen_entries_are_compared_as_such_and_not_by_value() -> None:
    key = FFN.format(0)
    a = make_scores({key: vector(1, 2, 3)}, {key: [2]})
    same = compare(a, make_scores({key: vector(1, 2, 9)}, {key: [2]}))
    assert same.within(0.0)
    assert same.sites[0].num_compared == 2
    other = compare(a, make_scores({key: vector(1, 2, 3)}))
    assert other.mismatches == (f"{key}: unseen in A: [2], in B: none",)
    assert not other.within(1.0)
    whole = compare(a, make_scores({}, {key: "all"}))
    assert whole.mismatches == (f"{key}: unseen in A: [2], in B: all",)


def test_runs_of_different_things_are_noted_and_decide_nothing() -> None:
    key = FFN.format(0)
    a = make_scores({key: vector(1)}, model={"name": "x"}, num_tokens=8, weights_fingerprint="aa", layout={"tensor": 1})
    b = make_scores({key: vector(1)}, model={"name": "y"}, num_tokens=8, weights_fingerprint="bb", layout={"tensor": 2})
    comparison = compare(a, b)
    assert comparison.notes == (
        "weights_fingerprint: aa in A, bb in B",
        "layout: tensor=1 in A, tensor=2 in B",
        "model.name: x in A, y in B",
    )
    assert comparison.within(0.0)


def render(*args: object, **options: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(render_comparison(*args, **options))  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_worst_sites_come_first_and_the_rest_on_demand() -> None:
    a = make_scores({FFN.format(layer): vector(1, 2) for layer in range(25)})
    b = make_scores({FFN.format(layer): vector(1, 2 + layer / 1000) for layer in range(25)})
    comparison = compare(a, b)
    rows = [line.split(".")[0].strip() for line in render(comparison).splitlines() if "linear_fc2" in line]
    assert rows == [str(layer) for layer in range(24, 4, -1)]
    assert "5 more sites differ less; --all shows them" in render(comparison)
    assert render(comparison, show_all=True).count("linear_fc2") == 25


def test_the_verdict_is_said() -> None:
    a, b = make_scores({FFN.format(0): vector(1, 2)}), make_scores({FFN.format(0): vector(1, 2.2)})
    assert "NOT within the tolerance of 0.01" in render(compare(a, b), tolerance=0.01)
    assert "! 0.091" in render(compare(a, b), tolerance=0.01)
    assert ": within the tolerance of 0.1." in render(compare(a, b), tolerance=0.1)
    assert "tolerance" not in render(compare(a, b))
