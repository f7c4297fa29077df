"""Bad input of prune: one clear error each, before anything is written, and nothing left behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megascore
from megascore.errors import MegascoreError, ModelError, PlanError
from megascore.plans.plan import Plan
from megascore.pruning import tensor_stream
from tests.models import save_checkpoint, save_tokenizer, tensors_of
from tests.smaller import random_plan

pytestmark = pytest.mark.fast


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "parent", "llama", max_shard_size="100KB")


@pytest.fixture
def plan(parent: Path) -> Plan:
    return random_plan(parent, ffn=56, hidden_size=40)


@pytest.fixture
def refused(parent: Path, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., None]:
    """Expects an error of a text from prune, that nothing else is told, and that the output's folder stays empty."""

    def check(text: str, kind: type[MegascoreError] = PlanError, **changes: Any) -> None:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="megascore"), pytest.raises(kind) as caught:
            megascore.prune(changes.pop("folder", parent), changes.pop("plan", plan), out / "smaller", **changes)
        # The error is all that the user reads, in one line.
        assert [record.getMessage() for record in caplog.records] == []
        assert "\n" not in str(caught.value)
        assert text in str(caught.value)
        assert list(out.iterdir()) == []

    return check


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_shard_that_is_missing(refused: Callable[..., None], parent: Path) -> None:
    first_shard(parent).unlink()
    refused("not found: model.safetensors.index.json says that it holds", ModelError)


def test_a_shard_that_is_cut_off(refused: Callable[..., None], parent: Path) -> None:
    path = first_shard(parent)
    path.write_bytes(path.read_bytes()[:-100])
    refused("cannot be read as a safetensors file", ModelError)


def test_other_weights_of_the_same_shape(refused: Callable[..., None], parent: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "llama", seed=1)
    refused("has other weights: name that model", folder=other)


def test_a_plan_of_another_model(refused: Callable[..., None], plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.yaml")
    other = save_checkpoint(tmp_path / "other", "llama", num_hidden_layers=2)
    refused("is for a model with", folder=other, plan=tmp_path / "plan.yaml")


def test_a_tensor_that_the_family_does_not_have(refused: Callable[..., None], tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "odd", "llama")
    path = folder / "model.safetensors"
    save_file({**tensors_of(path), "model.layers.0.adapter.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    refused("such as model.layers.0.adapter.weight", folder=folder, plan=random_plan(folder, ffn=56))


def test_layers_of_different_sizes(refused: Callable[..., None], parent: Path, plan: Plan) -> None:
    uneven = plan.units.with_layer(1, ffn=tuple(range(8)))
    refused("plan without per_layer=true", plan=Plan(**{**vars(plan), "units": uneven}))


def test_no_layer_with_experts(refused: Callable[..., None], tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "moe", "qwen3_moe", mlp_only_layers=[0, 1, 2])
    plan = random_plan(folder, layers=3)
    units = type(plan.units)(plan.units.hidden_size, (0, 1, 2), {n: random_of(plan, n) for n in (0, 1, 2)})
    refused("keep one of the layers 3", folder=folder, plan=Plan(**{**vars(plan), "units": units}))


def random_of(plan: Plan, layer: int) -> Any:
    dense = next(kept for _, kept in plan.units.kept_layers() if kept.ffn)
    return plan.units.of_layers.get(layer, dense)


def test_a_list_for_layers_that_nobody_knows(refused: Callable[..., None], parent: Path) -> None:
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, "layer_scales": [1, 2, 3, 4]}))
    refused("config.json has layer_scales", plan=random_plan(parent, layers=2))
    # Without dropping layers it says what it said.
    megascore.prune(parent, random_plan(parent, ffn=56), parent.parent / "kept")
    assert json.loads((parent.parent / "kept" / "config.json").read_text())["layer_scales"] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [1, 3])
def test_a_full_disk(number: int, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, parent: Path) -> None:
    calls = []

    def write(descriptor: int, values: Any) -> int:
        calls.append(len(values))
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, values)

    class FullDisk:
        """The system, but for what is written."""

        def __getattr__(self, name: str) -> Any:
            return write if name == "write" else getattr(os, name)

    monkeypatch.setattr(tensor_stream, "os", FullDisk())
    refused("No space left on device. Nothing was left behind. Free the disk")


def test_a_folder_that_is_there(refused: Callable[..., None], parent: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(PlanError, match="exists already"):
        megascore.prune(parent, plan, tmp_path / "there")
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PlanError, match="exists already"):
        megascore.prune(parent, plan, tmp_path / "link")


def test_sorting_needs_the_score_file(refused: Callable[..., None], tmp_path: Path) -> None:
    refused("was made of scores in memory, so their file must be named", sort_only=True)
    scores = megascore.Scores({"decoder/layers/block_similarity": torch.ones(4)}, {})
    scores.save(tmp_path / "other.safetensors")
    refused("is not the score file that the plan was made of", sort_only=True, scores=tmp_path / "other.safetensors")


def test_other_files_come_along_and_the_input_stays(parent: Path, plan: Plan, tmp_path: Path) -> None:
    save_tokenizer(parent)
    (parent / "templates").mkdir()
    (parent / "templates" / "chat.jinja").write_text("{{ text }}")
    (parent / "pytorch_model.bin").write_bytes(b"pickle")
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    megascore.prune(parent, plan, tmp_path / "smaller")
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    names = {str(path.relative_to(tmp_path / "smaller")) for path in (tmp_path / "smaller").rglob("*")}
    assert {"tokenizer.json", "tokenizer_config.json", "templates/chat.jinja", "megascore_prune.json"} <= names
    assert "pytorch_model.bin" not in names
    index = json.loads((tmp_path / "smaller" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
    sizes = {path.name: len(tensors_of(path)) for path in (tmp_path / "smaller").glob("*.safetensors")}
    assert sum(sizes.values()) == len(index["weight_map"])
    record = json.loads((tmp_path / "smaller" / "megascore_prune.json").read_text())
    assert record["old_indices"]["hidden_size"] == list(plan.units.hidden_size)
    assert record["old_indices"]["by_layer"]["3"]["ffn"] == list(plan.units.of_layers[3].ffn)
    assert record["parent"]["weights_fingerprint"] == plan.weights_fingerprint


def test_a_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4, "vocab_size": 1024}
    folder = save_checkpoint(tmp_path / "large", "qwen2", **sizes)
    random_plan(folder, ffn="75%", hidden_size="90%").save(tmp_path / "plan.yaml")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "megascore", "prune", tmp_path / "plan.yaml", folder, tmp_path / "out" / "pruned"]
    process = subprocess.Popen(command)
    while process.poll() is None and not list((tmp_path / "out").iterdir()):
        time.sleep(0.01)
    process.terminate()
    # A fast machine may have come to the end.
    assert process.wait(60) in (0, 143)
    assert [path.name for path in (tmp_path / "out").iterdir()] == (["pruned"] if process.returncode == 0 else [])
