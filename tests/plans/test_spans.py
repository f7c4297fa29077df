"""Plans by scores of layers that are negative, or of several consecutive layers together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import megascore
from megascore.errors import ConfigError, PlanError
from megascore.scores.compare import compare
from megascore.scores.ranking import rankings
from megascore.sites.requests import resolve_scores
from tests.models import save_checkpoint
from tests.plans.test_plan import scores_of

LOSS, SPANS = "decoder/layers/loss_without", "decoder/layers/span_similarity"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("dense") / "parent", "llama", num_hidden_layers=6)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def layers(scores: megascore.Scores, method: str, size: int) -> tuple[int, ...]:
    return megascore.plan(scores, layers=size, methods={"layers": method}).units.layers


def test_negative_scores_go_first_and_unseen_ones_before_them(folder: Path) -> None:
    scores = scores_of(folder, {LOSS: [4]}, **{LOSS: vector(-3, 2, -1, 0.5, 0, -0.25)})
    assert layers(scores, "loss_without", 5) == (0, 1, 2, 3, 5)
    assert layers(scores, "loss_without", 4) == (1, 2, 3, 5)
    [ranking] = [ranking for ranking in rankings(scores) if ranking.key == LOSS]
    # -1 stands for layer 4, but is measured of layer 2.
    assert ranking.ascending() == [0, 2, 5, 3, 1]
    assert ranking.measured.tolist() == [-3, 2, -1, 0.5, -0.25]
    other = scores_of(folder, {LOSS: [4]}, **{LOSS: vector(-3, 2, 1, 0.5, 0, -0.25)})
    [site] = [site for site in compare(scores, other).sites if site.key == LOSS]
    assert (site.num_compared, site.largest_difference) == (5, 2.0)


def test_negative_scores_are_shown(folder: Path) -> None:
    from rich.console import Console

    from megascore.scores.report import render_scores

    console = Console(record=True, width=100)
    console.print(render_scores(scores_of(folder, {LOSS: [4]}, **{LOSS: vector(-3, 2, -1, 0.5, 0, -0.25)})))
    shown = console.export_text()
    lines = [line.split() for line in shown[shown.index("loss_without") :].splitlines()]
    assert ["0", "-3", "1", "goes"] in [line[:4] for line in lines]
    assert ["2", "-1", "2"] in [line[:3] for line in lines]
    assert ["4", "-", "-", "unseen"] in [line[:4] for line in lines]


def test_the_best_span_goes_as_a_whole(folder: Path) -> None:
    scores = scores_of(folder, {SPANS: [4, 5]}, **{SPANS: vector(0.4, 0.3, 0.1, 0.2, 9, 9)})
    plan = megascore.plan(scores, layers=3, methods={"layers": "span_similarity"})
    assert plan.units.layers == (0, 1, 5)
    assert not any("no token reached" in text for text in plan.warnings)


@pytest.mark.parametrize("size", [5, 4, 2])
def test_another_number_of_layers_than_a_span_has_is_refused(size: int, folder: Path) -> None:
    scores = scores_of(folder, {SPANS: [4, 5]}, **{SPANS: vector(0.4, 0.3, 0.1, 0.2, 9, 9)})
    with pytest.raises(
        PlanError, match=rf"span=3.*the plan removes {6 - size}: ask for layers=3, score with span: {6 - size}"
    ):
        megascore.plan(scores, layers=size, methods={"layers": "span_similarity"})


@pytest.mark.parametrize("span", [0, -1, 1.5, True, "2"])
def test_a_span_that_is_no_number_of_layers_is_refused(span: object) -> None:
    with pytest.raises(ConfigError, match="span is .* expected a whole number of layers, 1 or more"):
        resolve_scores([{"target": "layers", "method": "span_similarity", "span": span}])
