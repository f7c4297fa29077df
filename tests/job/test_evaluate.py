"""Evaluations and searches as whole jobs: the figures of a float64 oracle, on every layout; a search goes on.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import megascore
from megascore.config import load_config
from megascore.errors import MegascoreError
from megascore.evaluation.statistics import ratio
from tests.models import save_checkpoint
from tests.pool import WorkerPool
from tests.smaller import exact, random_plan, scored

SAMPLES, LENGTH = 7, 16
PADDED = [16, 9, 16, 2, 16, 16, 12]
"""Real tokens of each sample."""
LAYOUTS = {
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 2, SP, PP 2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "DP 2": (2, []),
    "CP 2": (2, ["parallel.context=2"]),
    "PP 2 x VPP 2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@dataclass(frozen=True)
class Files:
    """A parent, a plan of it, the folder that it makes, documents, and a job's config."""

    root: Path
    plan: megascore.Plan

    @property
    def config(self) -> Path:
        return self.root / "job.yaml"

    def request(self, **more: Any) -> dict[str, Any]:
        return {"plan": str(self.root / "plan.yaml"), "smaller": str(self.root / "pruned"), **more}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("evaluate")
    # 129 tokens: tensor parallelism pads them.
    folder = save_checkpoint(root / "parent", "qwen3", vocab_size=129, num_key_value_heads=4)
    plan = random_plan(folder, 5, hidden_size=56, ffn=72, attention_heads=2)
    plan.save(root / "plan.yaml")
    megascore.prune(folder, plan, root / "pruned")
    ids = np.random.default_rng(3).integers(0, 129, (SAMPLES, LENGTH))
    lines = [json.dumps({"ids": row[:length].tolist()}) for row, length in zip(ids, PADDED, strict=True)]
    (root / "documents.jsonl").write_text("\n".join(lines))
    (root / "short.jsonl").write_text("\n".join(['{"ids": [3]}'] * 4))
    (root / "job.yaml").write_text(
        f"model: {{hf: '{folder}', dtype: float64}}\n"
        f"data: {{jsonl: '{root / 'documents.jsonl'}', field: ids, packing: false, sequence_length: {LENGTH}}}\n"
        "run: {device: cpu, global_batch_size: 4, timeout_minutes: 1, overwrite: true}\n"
    )
    return Files(root, plan)


def evaluate_on_rank(config: Path, request: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any] | str:
    from megascore.job.evaluate import EvaluationRequest, run_evaluation

    shown = io.StringIO()
    try:
        wanted = EvaluationRequest(**request)
        evaluation = run_evaluation(load_config(config, overrides), wanted, Console(file=shown, width=120))
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"
    return evaluation.as_json()


def search_on_rank(
    config: Path, scores: str, wanted: dict[str, str], folder: str, overrides: Sequence[str] = ()
) -> dict[str, Any] | str:
    from megascore.job.search import SearchRequest, run_search

    shown = io.StringIO()
    try:
        request = SearchRequest(scores, wanted, folder)
        results = run_search(load_config(config, overrides), request, Console(file=shown, width=120))
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"
    return {"shown": shown.getvalue(), **{name: result.as_json() for name, result in results.items()}}


@pytest.fixture(scope="module")
def alone(files: Files, world: WorkerPool) -> dict[str, Any]:
    [result] = world.run(1, evaluate_on_rank, files.config, files.request())
    assert isinstance(result, dict), result
    return result


@torch.no_grad()
def naive_sums(files: Files) -> Tensor:
    """Sums by sample, as formulas over whole vocabularies say, of the parent and the pruned folder in transformers."""
    models = [exact(files.root / "parent"), exact(files.root / "pruned")]
    rows = []
    for line in (files.root / "documents.jsonl").read_text().splitlines():
        ids = torch.tensor([json.loads(line)["ids"]])
        p, q = (torch.softmax(model(ids).logits[0, :-1], -1) for model in models)
        labels = ids[0, 1:, None]
        values = [
            torch.ones(len(labels), dtype=torch.float64),
            -p.gather(1, labels).log().squeeze(1),
            -q.gather(1, labels).log().squeeze(1),
            (p * (p / q).log()).sum(1),
            (p.argmax(1) == q.argmax(1)).double(),
            torch.minimum(p, q).sum(1),
        ]
        rows.append(torch.stack([value.sum() for value in values]))
    return torch.stack(rows)


def test_the_figures_are_those_of_formulas_over_whole_vocabularies(files: Files, alone: dict[str, Any]) -> None:
    sums = naive_sums(files)
    tokens = sums[:, 0]
    assert alone["num_tokens"] == int(tokens.sum()) == sum(PADDED) - SAMPLES
    [pruned] = [entry for entry in alone["results"] if entry["name"] == "pruned"]
    columns = {
        "loss_rise": sums[:, 2] - sums[:, 1],
        "kl": sums[:, 3],
        "agreement": sums[:, 4],
        "acceptance": sums[:, 5],
    }
    # transformers and Megatron-Core compute rotary angles and softmax of attention in float32.
    assert alone["parent"]["loss"] == pytest.approx(float(sums[:, 1].sum() / tokens.sum()), abs=1e-6)
    for name, column in columns.items():
        expected = ratio(column, tokens)
        assert pruned[name]["mean"] == pytest.approx(expected.mean, abs=1e-6), name
        assert pruned[name]["standard_error"] == pytest.approx(expected.standard_error, abs=1e-6), name


def test_masks_give_the_figures_of_the_pruned_folder(alone: dict[str, Any]) -> None:
    by_name = {entry["name"]: entry for entry in alone["results"]}
    assert set(by_name) == {"pruned", "plan.yaml", "random", "weight norm"}
    for name in ("loss_rise", "kl", "agreement", "acceptance"):
        assert by_name["plan.yaml"][name] == pytest.approx(by_name["pruned"][name], abs=1e-9)
        assert by_name["random"][name] != pytest.approx(by_name["pruned"][name], abs=1e-4)
    assert by_name["plan.yaml"]["size"] == by_name["pruned"]["size"] == by_name["random"]["size"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_figures(
    layout: str, files: Files, alone: dict[str, Any], world: WorkerPool
) -> None:
    world_size, overrides = LAYOUTS[layout]
    results = world.run(world_size, evaluate_on_rank, files.config, files.request(), overrides)
    for result in results:
        assert isinstance(result, dict), result
        assert result["num_tokens"] == alone["num_tokens"]
        for entry, expected in zip(result["results"], alone["results"], strict=True):
            assert entry["name"] == expected["name"]
            for name in ("loss_rise", "kl", "agreement", "acceptance"):
                # Float64, summed in another order.
                assert entry[name] == pytest.approx(expected[name], abs=1e-9), (layout, name)


def test_the_result_is_written_as_json(files: Files, alone: dict[str, Any], world: WorkerPool) -> None:
    path = files.root / "result.json"
    world.run(1, evaluate_on_rank, files.config, files.request(output=str(path), baselines=()))
    written = json.loads(path.read_text())
    assert [entry["name"] for entry in written["results"]] == ["pruned", "plan.yaml"]
    assert written["parent"] == alone["parent"]
    assert written["weights_fingerprint"] == files.plan.weights_fingerprint


@pytest.mark.parametrize(
    ("request_", "overrides", "text"),
    [
        ({}, [], "nothing is to be evaluated"),
        ({"plan": "plan.yaml", "baselines": ("best",)}, [], "baselines has 'best'"),
        ({"plan": "missing.yaml"}, [], "missing.yaml not found"),
        ({"smaller": "missing"}, [], "missing"),
        ({"plan": "plan.yaml"}, ["model.hf={root}/pruned"], "is for a model with"),
        ({"plan": "plan.yaml"}, ["data.jsonl={root}/short.jsonl"], "no token is predicted"),
    ],
)
def test_bad_input_is_one_clear_error(
    request_: dict[str, Any], overrides: list[str], text: str, files: Files, world: WorkerPool
) -> None:
    request = {key: str(files.root / value) if key in ("plan", "smaller") else value for key, value in request_.items()}
    [result] = world.run(
        1, evaluate_on_rank, files.config, request, [override.format(root=files.root) for override in overrides]
    )
    assert isinstance(result, str)
    assert text in result


def test_a_sample_pairs_with_itself() -> None:
    tokens = torch.tensor([4.0, 8.0, 4.0], dtype=torch.float64)
    same = ratio(0.25 * tokens, tokens)
    assert (same.mean, same.standard_error) == (0.25, 0.0)
    # Of samples of equal length it is the usual standard error of a mean.
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    equal = ratio(values * 5, torch.full((3,), 5.0, dtype=torch.float64))
    assert equal.standard_error == pytest.approx(float(values.std()) / math.sqrt(3), rel=1e-12)
    assert math.isnan(ratio(values[:1], tokens[:1]).standard_error)


def test_a_search_finds_the_best_plan_and_goes_on_where_it_stopped(
    files: Files, tmp_path: Path, world: WorkerPool
) -> None:
    folder = files.root / "parent"
    scored(folder, "ffn", "hidden_size", "layers").save(tmp_path / "scores.safetensors")
    wanted = {
        "params": "80%",
        "multiple_of": "8",
        "same_weights": "true",
        "layers": "4,3",
        "hidden_size": "64,56",
    }
    arguments = (files.config, str(tmp_path / "scores.safetensors"), wanted)
    [whole] = world.run(1, search_on_rank, *arguments, str(tmp_path / "whole"))
    assert isinstance(whole, dict), whole
    names = set(whole) - {"shown"}
    assert {"ffn 24", "layers 3, ffn 72"} - names == set() or len(names) >= 4, names
    assert all(whole[name]["size"]["parameters"] <= 0.8 * files.plan.before.parameters for name in names)
    best = min(names, key=lambda name: whole[name]["loss"])
    plan = megascore.load_plan(tmp_path / "whole" / "best.yaml")
    assert plan.after.parameters == whole[best]["size"]["parameters"]

    # As if it had been killed: half of the results are gone.
    state = json.loads((tmp_path / "whole" / "search.json").read_text())
    state["results"] = state["results"][1::2]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "search.json").write_text(json.dumps(state))
    [again, _] = world.run(2, search_on_rank, *arguments, str(tmp_path / "half"), ["parallel.tensor=2"])
    assert isinstance(again, dict), again
    assert f"plans 1 to {len(names) - len(state['results'])}" in again["shown"]
    for name in names:
        assert again[name]["loss"] == pytest.approx(whole[name]["loss"], abs=1e-9)
    [other] = world.run(
        1, search_on_rank, files.config, arguments[1], {**wanted, "params": "70%"}, str(tmp_path / "whole")
    )
    assert "holds a search with other wanted" in str(other)
