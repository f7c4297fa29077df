"""Plans by scores: what stays, what is told, and the file that a person edits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import megascore
from megascore.errors import MegascoreError, ModelError, PlanError
from megascore.plans.parent import Parent
from megascore.plans.weight_norms import WeightNormOrders
from megascore.scores.score_file import Unseen
from tests.models import load_with_transformers, save_checkpoint

pytestmark = pytest.mark.fast

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("dense") / "parent", "qwen3", **HEADS)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("moe") / "parent", "qwen3_moe")


def noise(size: int, seed: int) -> Tensor:
    return 0.1 + torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_of(folder: Path, unseen: dict[str, Unseen] | None = None, **changes: Any) -> megascore.Scores:
    """Random scores of every target of a tiny model, as a job writes them."""
    parent = Parent.of(folder)
    model, values = parent.config.architecture, {}
    for layer in range(model.num_layers):
        site = f"decoder.layers.{layer}"
        values[f"{site}.self_attention.linear_proj/attention_heads/l2_norm"] = noise(model.num_heads, layer)
        values[f"{site}.self_attention.linear_proj/kv_heads/independent_contribution"] = noise(
            model.num_kv_heads, layer
        )
        if model.experts is not None and model.experts.layers[layer]:
            values[f"{site}.mlp.experts/experts/router_weighted_norm"] = noise(model.experts.num_experts, layer)
            for expert in range(model.experts.num_experts):
                values[f"{site}.mlp.experts.{expert}.linear_fc2/expert_ffn/l2_norm"] = noise(
                    model.experts.ffn_size, 100 * layer + expert
                )
        else:
            values[f"{site}.mlp.linear_fc2/ffn/l2_norm"] = noise(model.ffn_size, 50 + layer)
    values["decoder/hidden_size/l2_norm"] = noise(model.hidden_size, 7)
    values["decoder/layers/block_similarity"] = noise(model.num_layers, 8)
    metadata = {
        # Else it is the time, and two plans of equal scores name other score files where a second has passed.
        "created": "2026-01-01T00:00:00+00:00",
        "model": {
            "path": str(folder),
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
        },
        "weights_fingerprint": parent.fingerprint,
        **changes.pop("metadata", {}),
    }
    return megascore.Scores({**values, **changes}, metadata, unseen)


def lowest(values: Tensor, number: int) -> set[int]:
    return set(values.argsort()[:number].tolist())


def test_the_lowest_units_go(dense: Path) -> None:
    scores = scores_of(dense)
    plan = megascore.plan(scores, ffn="75%", hidden_size=56, layers=3, attention_heads=4, kv_heads=2, multiple_of=8)
    units = plan.units
    assert set(range(64)) - set(units.hidden_size) == lowest(scores["decoder/hidden_size"], 8)
    assert set(range(4)) - set(units.layers) == lowest(scores["decoder/layers"], 1)
    for layer, kept in units.kept_layers():
        site = f"decoder.layers.{layer}"
        assert set(range(96)) - set(kept.ffn) == lowest(scores[f"{site}.mlp.linear_fc2/ffn"], 24)
        kv_scores = scores[f"{site}.self_attention.linear_proj/kv_heads"]
        assert set(range(4)) - set(kept.kv_heads) == lowest(kv_scores, 2)
        # All heads of the KV heads that stay: of two each.
        assert set(kept.attention_heads) == {2 * kv + head for kv in kept.kv_heads for head in (0, 1)}
    assert plan.scores.methods["kv_heads"] == "independent_contribution"


def test_query_heads_go_inside_their_groups(dense: Path) -> None:
    scores = scores_of(dense)
    plan = megascore.plan(scores, attention_heads=4)
    for layer, kept in plan.units.kept_layers():
        values = scores[f"decoder.layers.{layer}.self_attention.linear_proj/attention_heads"].view(4, 2)
        assert kept.attention_heads == tuple(2 * kv + int(values[kv].argmax()) for kv in range(4))
        assert kept.kv_heads == (0, 1, 2, 3)


def test_experts_keep_channels_of_their_own_and_those_that_no_token_reached_go_first(moe: Path) -> None:
    unseen: dict[str, Unseen] = {
        "decoder.layers.2.mlp.experts/experts/router_weighted_norm": [5],
        "decoder.layers.0.mlp.experts.3.linear_fc2/expert_ffn/l2_norm": "all",
    }
    values = scores_of(moe)
    scores = scores_of(moe, unseen)
    plan = megascore.plan(scores, experts=6, expert_ffn=16, multiple_of=8)
    assert 5 not in plan.units.of_layers[2].experts
    assert any("layer 2: no token reached the experts 5, and they go" in text for text in plan.warnings)
    assert any("8 experts in a layer" in text for text in plan.warnings)
    for layer, kept in plan.units.kept_layers():
        for expert, channels in zip(kept.experts, kept.expert_ffn, strict=True):
            if (layer, expert) != (0, 3):
                column = values[f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2/expert_ffn"]
                assert set(range(40)) - set(channels) == lowest(column, 24)
    if 3 in plan.units.of_layers[0].experts:
        assert any("no token reached decoder.layers.0.mlp.experts.3.linear_fc2" in text for text in plan.warnings)
    assert plan.units.of_layers[1].experts == ()


def test_scores_that_are_all_alike_are_told(dense: Path) -> None:
    flat = {f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm": 1 + noise(96, layer) / 100 for layer in range(4)}
    plan = megascore.plan(scores_of(dense, **flat), ffn="50%", multiple_of=8)
    assert any("the scores of ffn hardly differ" in text for text in plan.warnings)
    assert not any("ffn" in text for text in megascore.plan(scores_of(dense), ffn="50%", multiple_of=8).warnings)


def test_layers_share_channels_by_importance(dense: Path) -> None:
    skewed = {
        f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm": noise(96, layer) ** (4 - layer) for layer in range(4)
    }
    plan = megascore.plan(scores_of(dense, **skewed), ffn="50%", multiple_of=8, per_layer=True)
    numbers = [len(kept.ffn) for _, kept in plan.units.kept_layers()]
    assert sum(numbers) == 4 * 48
    assert len(set(numbers)) > 1
    assert all(number % 8 == 0 and number for number in numbers)
    assert any("heterogeneous layer specs" in text for text in plan.warnings)


@pytest.mark.parametrize(
    ("wanted", "changes", "text"),
    [
        (
            {"ffn": "50%"},
            {"metadata": {"weights_fingerprint": "0" * 64}},
            "of weights with the fingerprint 000000000000",
        ),
        (
            {"ffn": "50%"},
            {"metadata": {"model": {"path": "{folder}", "num_layers": 5}}},
            "the scores are of a model with num_layers 5, and",
        ),
        (
            {"ffn": "50%"},
            {"metadata": {"model": {"name": "somewhere"}}},
            "the model 'somewhere', which is no",
        ),
        ({"ffn": "50%", "method.ffn": "mine"}, {}, "method.ffn=mine: the score file has l2_norm"),
        ({"ffn": "100%"}, {}, "by the rules nothing goes"),
        (
            {"ffn": "50%"},
            {"decoder.layers.1.mlp.linear_fc2/ffn/mine": noise(96, 1)},
            "ffn was scored by l2_norm, mine: choose one, method.ffn=",
        ),
        (
            {"ffn": "50%", "method.ffn": "mine"},
            {"decoder.layers.1.mlp.linear_fc2/ffn/mine": noise(96, 1)},
            "no ffn/mine of layer 0",
        ),
        (
            {"ffn": "50%"},
            {"decoder.layers.1.mlp.linear_fc2/ffn/l2_norm": noise(95, 1)},
            "95 scores for decoder.layers.1.mlp.linear_fc2/ffn/l2_norm, and the model has 96",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    wanted: dict[str, Any], changes: dict[str, Any], text: str, dense: Path
) -> None:
    model = changes.get("metadata", {}).get("model", {})
    if model.get("path") == "{folder}":
        model["path"] = str(dense)
    methods = {"ffn": wanted.pop("method.ffn")} if "method.ffn" in wanted else {}
    with pytest.raises(PlanError) as caught:
        megascore.plan(scores_of(dense, **changes), methods=methods, multiple_of=8, **wanted)
    assert text in str(caught.value)


def test_a_target_without_scores_is_named(dense: Path) -> None:
    some = scores_of(dense)
    few = megascore.Scores({key: some[key] for key in some if "/ffn/" in key}, some.metadata)
    with pytest.raises(PlanError, match="no scores of layers; it has scores of ffn"):
        megascore.plan(few, layers=2)


def test_a_folder_that_is_no_checkpoint_is_told(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        megascore.plan(scores_of(dense), model=tmp_path, ffn="50%")


@pytest.fixture
def saved(dense: Path, tmp_path: Path) -> Path:
    plan = megascore.plan(scores_of(dense), ffn="75%", layers=3, attention_heads=4, hidden_size=56, multiple_of=8)
    plan.save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_a_plan_comes_back_from_its_file(dense: Path, moe: Path, tmp_path: Path) -> None:
    plan = megascore.plan(scores_of(dense), ffn="75%", layers=3, attention_heads=4, hidden_size=56, multiple_of=8)
    plan.save(tmp_path / "plan.yaml")
    assert megascore.load_plan(tmp_path / "plan.yaml") == plan
    experts = megascore.plan(scores_of(moe), experts=6, expert_ffn=16, multiple_of=8)
    experts.save(tmp_path / "experts.yaml")
    assert megascore.load_plan(tmp_path / "experts.yaml", moe) == experts
    with pytest.raises(MegascoreError, match="exists already"):
        experts.save(tmp_path / "experts.yaml")
    experts.save(tmp_path / "experts.yaml", overwrite=True)


def test_an_edit_that_fits_is_taken(saved: Path) -> None:
    document = yaml.safe_load(saved.read_text())
    document["kept"]["layers"] = "1-3"
    document["kept"]["by_layer"] = {
        layer: {**document["kept"]["by_layer"].get(layer, {}), "ffn": "0-71", "attention_heads": "0, 2, 4, 7"}
        for layer in (1, 2, 3)
    }
    saved.write_text(yaml.safe_dump(document))
    plan = megascore.load_plan(saved)
    assert plan.units.layers == (1, 2, 3)
    assert plan.units.of_layers[3].attention_heads == (0, 2, 4, 7)


def edited(document: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split("/")
    for key in way:
        document = document[int(key) if key.isdecimal() else key]
    document[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("kept/layers", "0-3, 3", r"layers keeps \[3\] twice"),
        ("kept/layers", "0-4", "layers keeps 4, and the model has those up to 3"),
        ("kept/layers", "first three", "layers has 'first three'"),
        ("kept/hidden_size", "0-54", r"sizes says hidden_size 56, and 'kept' keeps \[55\]"),
        ("kept/hidden_size", "0-54, 64", r"hidden_size keeps \[64\], and the model has those from 0 to 63"),
        ("kept/by_layer/{layer}/ffn", "0-70", "sizes says ffn 72"),
        ("kept/by_layer/{layer}/attention_heads", "0, 1, 2, 4", "other numbers of attention heads for each KV head"),
        ("kept/by_layer/{layer}/heads", "0", "expected a mapping of attention_heads"),
        ("kept/by_layer/9", {"ffn": "0-71"}, "by_layer has the layers 9, which 'layers' does not keep"),
        ("kept/heads", "0", "kept has"),
        ("sizes/ffn/after", 70, "ffn=70: it must be a multiple of 8"),
        ("sizes/ffn/after", "many", "no whole plan"),
        ("sizes/ffn/before", 100, "is for a model with"),
        ("rules/tensor_parallel", 5, "tensor_parallel=5"),
        ("model/weights_fingerprint", "0" * 64, "is for weights with the fingerprint 000000000000"),
        ("megascore_plan", 2, "a plan of version 2"),
        ("scores", None, "no whole plan"),
    ],
)
def test_an_edit_that_does_not_fit_is_told(path: str, value: Any, text: str, saved: Path) -> None:
    document = yaml.safe_load(saved.read_text())
    layer = next(iter(document["kept"]["by_layer"]))
    edited(document, path.replace("{layer}", str(layer)), value)
    saved.write_text(yaml.safe_dump(document))
    with pytest.raises(PlanError) as caught:
        megascore.load_plan(saved)
    assert re.search(text, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "is no plan"), ("a: [", "is no YAML"), ("- 1", "is no plan"), ("\x00", "is no YAML"), ("a: 1", "is no plan")],
)
def test_what_is_no_plan_is_told(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(PlanError, match=text):
        megascore.load_plan(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="not found"):
        megascore.load_plan(tmp_path / "missing.yaml")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("fused", [False, True])
def test_weight_norms_are_those_of_all_weights_of_a_unit(family: str, fused: bool, tmp_path: Path) -> None:
    if fused and family == "llama":
        pytest.skip("a dense model has no experts to fuse")
    folder = save_checkpoint(tmp_path / "parent", family, fused_experts=fused)
    orders, parent = WeightNormOrders(Parent.of(folder)), Parent.of(folder)
    model = load_with_transformers(folder, torch.float64)
    layer: Any = model.model.layers[2]
    heads, head_dim = 4, parent.config.head_dim

    def close(found: Tensor, *squares: Tensor) -> None:
        torch.testing.assert_close(found, sum(squares, torch.zeros(())).sqrt(), rtol=1e-6, atol=0)

    attention = layer.self_attn
    rows: Callable[[Tensor], Tensor] = lambda weight: weight.detach().square().view(heads, head_dim, -1).sum((1, 2))  # noqa: E731
    bias = rows(attention.q_proj.bias[:, None]) if attention.q_proj.bias is not None else torch.zeros(heads)
    close(
        orders.values("attention_heads", 2, None, heads),
        rows(attention.q_proj.weight),
        rows(attention.o_proj.weight.T),
        bias,
    )
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    whole = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
    assert float(orders.values("layers", None, None, 4)[2]) == pytest.approx(float(whole.sqrt()), rel=1e-6)
    if family == "llama":
        close(
            orders.values("ffn", 2, None, 96),
            weights["mlp.gate_proj.weight"].square().sum(1),
            weights["mlp.up_proj.weight"].square().sum(1),
            weights["mlp.down_proj.weight"].square().sum(0),
        )
        return
    gate_up, down = weights["mlp.experts.gate_up_proj"], weights["mlp.experts.down_proj"]
    size = down.shape[2]
    close(
        orders.values("expert_ffn", 2, 1, size),
        gate_up[1].square().sum(1).view(2, size).sum(0),
        down[1].square().sum(0),
    )
    close(
        orders.values("experts", 2, None, len(down)),
        gate_up.square().sum((1, 2)),
        down.square().sum((1, 2)),
        weights["mlp.gate.weight"].square().sum(1),
    )
