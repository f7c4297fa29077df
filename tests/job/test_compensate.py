"""Pruning with projections that are fitted again: a float64 oracle's weights on every layout; a kill loses a layer.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import megascore
from megascore.api.attach import view_of
from megascore.config import load_config
from megascore.errors import MegascoreError
from megascore.masks.masked import masked_view
from tests.models import load_with_transformers, save_checkpoint
from tests.pool import WorkerPool
from tests.smaller import exact, random_plan

SAMPLES, LENGTH, RIDGE = 6, 24, 0.03
PADDED = [24, 17, 24, 9, 24, 24]
"""Real tokens of each sample."""
TOLERANCE = {"rtol": 1e-6, "atol": 2e-7}
"""The files are in float32; the sums are in float64."""
OF_ORACLE = {"rtol": 1e-6, "atol": 1e-6}
"""transformers takes the angles of positions in float32, and the inverse of the Gram matrix makes that more."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 2, SP, PP 2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "DP 2": (2, []),
    "CP 2": (2, ["parallel.context=2"]),
    "PP 2 x VPP 2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}
EXPERT_LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "EP 2": (2, ["parallel.expert=2"]),
    "TP 2, SP, ETP 2": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"]),
}


@dataclass(frozen=True)
class Files:
    """A parent, a plan of it, documents, and a job's config."""

    root: Path
    plan: megascore.Plan
    documents: Tensor

    @property
    def parent(self) -> Path:
        return self.root / "parent"


def make_files(root: Path, family: str, sizes: dict[str, Any], **wanted: Any) -> Files:
    folder = save_checkpoint(root / "parent", family, **sizes)
    plan = random_plan(folder, 5, **wanted)
    plan.save(root / "plan.yaml")
    ids = np.random.default_rng(3).integers(0, 128, (SAMPLES, LENGTH))
    lines = [json.dumps({"ids": row[:length].tolist()}) for row, length in zip(ids, PADDED, strict=True)]
    (root / "documents.jsonl").write_text("\n".join(lines))
    (root / "job.yaml").write_text(
        f"model: {{hf: '{folder}', dtype: float64}}\n"
        f"data: {{jsonl: '{root / 'documents.jsonl'}', field: ids, packing: false, sequence_length: {LENGTH}}}\n"
        "run: {device: cpu, global_batch_size: 2, timeout_minutes: 1}\n"
    )
    return Files(root, plan, torch.tensor(ids))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    wanted = {"hidden_size": 56, "ffn": 72, "attention_heads": 4, "layers": 3}
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return make_files(tmp_path_factory.mktemp("compensate"), "qwen3", sizes, **wanted)


@pytest.fixture(scope="module")
def expert_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    wanted = {"attention_heads": 2, "experts": 3, "expert_ffn": 56}
    return make_files(tmp_path_factory.mktemp("experts"), "mixtral", {}, **wanted)


def compensate_on_rank(
    root: Path, output: str, overrides: Sequence[str] = (), method: str = "least_squares", stop_after: int | None = None
) -> str | None:
    """Run the job; return a user's error, or None. ``stop_after`` fails when so many layers are saved."""
    from megascore.compensation.work_folder import WorkFolder
    from megascore.job.compensate import CompensationRequest, run_compensation

    request = CompensationRequest(str(root / "plan.yaml"), str(root / output), method)
    config = load_config(root / "job.yaml", overrides)
    with pytest.MonkeyPatch.context() as patch:
        if stop_after is not None:
            save = WorkFolder.save_progress

            def failing(self: WorkFolder, identity: Any, layers: int, facts: Any) -> None:
                save(self, identity, layers, facts)
                if layers == stop_after:
                    raise KeyboardInterrupt

            patch.setattr(WorkFolder, "save_progress", failing)
        try:
            run_compensation(config, request, Console(file=io.StringIO()))
        except (MegascoreError, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {error}"
    return None


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def fitted(files: Files) -> dict[str, Tensor]:
    """The weights that one process makes."""
    assert compensate_on_rank(files.root, "one") is None
    return weights_of(files.root / "one")


def inputs_of(model: nn.Module, name: str, files: Files) -> Tensor:
    """Inputs of a module at the tokens that count, [tokens, channels]."""
    caught: list[Tensor] = []
    # Before the hook that masks.
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]), prepend=True)
    with torch.no_grad():
        model(files.documents)
    handle.remove()
    counts = torch.arange(LENGTH)[None] < torch.tensor(PADDED)[:, None]
    return caught[0][counts]


def oracle(files: Files) -> dict[str, Tensor]:
    """New weights of all projections, [hidden, kept], from the normal equations on the whole model."""
    parent, units = exact(files.parent), files.plan.units
    child = copy.deepcopy(parent)
    found = {}
    head_dim = parent.config.head_dim
    for layer, kept in units.kept_layers():
        heads = [head * head_dim + channel for head in kept.attention_heads for channel in range(head_dim)]
        for module, channels in (("self_attn.o_proj", heads), ("mlp.down_proj", list(kept.ffn))):
            name = f"model.layers.{layer}.{module}"
            with masked_view(view_of(child), units, parent.config.num_attention_heads):
                x = inputs_of(child, name, files)
            z = x[:, channels]
            weight = parent.get_submodule(name).weight.detach()
            missing = x @ weight.T - z @ weight[:, channels].T
            gram = z.T @ z
            gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            new = weight[:, channels] + torch.linalg.solve(gram, z.T @ missing).T
            with torch.no_grad():
                child.get_submodule(name).weight[:, channels] = new
            found[f"{name}.weight"] = new[list(units.hidden_size)]
    return found


def test_weights_are_those_of_the_normal_equations(files: Files, fitted: dict[str, Tensor]) -> None:
    expected = oracle(files)
    plain, fitted = weights_of_plain(files), dict(fitted)
    assert fitted.keys() == plain.keys()
    renumbered = {layer: number for number, layer in enumerate(files.plan.units.layers)}
    for name, wanted in expected.items():
        layer = int(name.split(".")[2])
        new = name.replace(f"layers.{layer}.", f"layers.{renumbered[layer]}.")
        torch.testing.assert_close(fitted[new].double(), wanted, **OF_ORACLE, msg=name)
        assert not torch.equal(fitted.pop(new), plain.pop(new))
    for name, values in plain.items():
        assert torch.equal(fitted[name], values), name


def weights_of_plain(files: Files) -> dict[str, Tensor]:
    if not (files.root / "plain").exists():
        megascore.prune(files.parent, files.plan, files.root / "plain")
    return weights_of(files.root / "plain")


def test_the_model_loads_is_nearer_to_its_parent_and_says_what_was_done(
    files: Files, fitted: dict[str, Tensor]
) -> None:
    weights_of_plain(files)
    parent = load_with_transformers(files.parent, torch.float64)
    errors = []
    for name in ("one", "plain"):
        model = load_with_transformers(files.root / name, torch.float64)
        with torch.no_grad():
            errors.append(float((model(files.documents).logits - parent(files.documents).logits).square().sum()))
    assert errors[0] < errors[1]
    record = json.loads((files.root / "one" / "megascore_prune.json").read_text())["compensation"]
    assert record["method"] == "least_squares"
    assert len(record["projections"]) == 6
    for projection in record["projections"]:
        assert projection["tokens"] == sum(PADDED)
        assert 0 < projection["error_left"] < 1
    assert not (files.root / "one.compensation").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_same_weights(
    layout: str, files: Files, fitted: dict[str, Tensor], world: WorkerPool
) -> None:
    world_size, overrides = LAYOUTS[layout]
    output = layout.replace(",", "").replace(" ", "_")
    told = world.run(world_size, compensate_on_rank, files.root, output, overrides)
    assert told == [None] * world_size
    for name, values in weights_of(files.root / output).items():
        torch.testing.assert_close(values, fitted[name], **TOLERANCE, msg=name)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_take_over_what_their_own_channels_gave(layout: str, expert_files: Files, world: WorkerPool) -> None:
    world_size, overrides = EXPERT_LAYOUTS[layout]
    output = layout.replace(",", "").replace(" ", "_")
    told = world.run(world_size, compensate_on_rank, expert_files.root, output, overrides)
    assert told == [None] * world_size
    found = weights_of(expert_files.root / output)
    first = weights_of(expert_files.root / "one_process")
    for name, values in found.items():
        torch.testing.assert_close(values, first[name], **TOLERANCE, msg=name)
    record = json.loads((expert_files.root / output / "megascore_prune.json").read_text())["compensation"]
    of_experts = [entry for entry in record["projections"] if "experts" in entry["tensor"]]
    assert len(of_experts) == 4 * 3
    assert all(entry["error_left"] < 1 for entry in of_experts if entry["tokens"])


def test_a_bias_takes_the_mean_of_what_left(tmp_path: Path, world: WorkerPool) -> None:
    files = make_files(tmp_path, "llama", {"mlp_bias": True}, ffn=64, attention_heads=2)
    assert world.run(2, compensate_on_rank, tmp_path, "out", ["parallel.tensor=2"], "bias") == [None, None]
    found, plain = weights_of(tmp_path / "out"), weights_of_plain(files)
    parent, child = exact(files.parent), exact(files.parent)
    units = files.plan.units
    for layer, kept in units.kept_layers():
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            linear = child.get_submodule(name)
            width = linear.in_features // 4
            heads = [head * width + channel for head in kept.attention_heads for channel in range(width)]
            channels = list(kept.ffn) if "mlp" in module else heads
            with masked_view(view_of(child), units, parent.config.num_attention_heads):
                x = inputs_of(child, name, files)
            mean = (x @ linear.weight.T - x[:, channels] @ linear.weight[:, channels].T).mean(0)
            with torch.no_grad():
                linear.bias += mean
            wanted = linear.bias.detach()[list(units.hidden_size)]
            torch.testing.assert_close(found[f"{name}.bias"].double(), wanted, **OF_ORACLE, msg=name)
            assert torch.equal(found[f"{name}.weight"], plain[f"{name}.weight"])
            assert not torch.equal(found[f"{name}.bias"], plain[f"{name}.bias"])


@pytest.mark.parametrize("done", range(1, 5))
def test_a_kill_after_any_layer_loses_nothing_of_it(
    done: int, files: Files, fitted: dict[str, Tensor], tmp_path: Path
) -> None:
    root = copy_of(files, tmp_path)
    assert "KeyboardInterrupt" in str(compensate_on_rank(root, "out", stop_after=done))
    assert not (root / "out").exists()
    progress = json.loads((root / "out.compensation" / "compensation.json").read_text())
    assert progress["layers"] == done
    told = str(compensate_on_rank(root, "out", ["data.num_samples=4"]))
    assert "what a stopped compensation has left, of another data_fingerprint, num_samples, num_steps" in told
    assert compensate_on_rank(root, "out") is None
    for name, values in weights_of(root / "out").items():
        torch.testing.assert_close(values, fitted[name], **TOLERANCE, msg=name)
    assert not (root / "out.compensation").exists()


def copy_of(files: Files, root: Path) -> Path:
    for name in ("plan.yaml", "job.yaml", "documents.jsonl"):
        (root / name).write_bytes((files.root / name).read_bytes())
    return root


def test_what_can_not_be_done_is_told(files: Files, tmp_path: Path) -> None:
    root = copy_of(files, tmp_path)
    assert "a qwen3 has no bias for model.layers.0.self_attn.o_proj.weight" in str(
        compensate_on_rank(root, "out", method="bias")
    )
    (root / "out").mkdir()
    assert "out exists already" in str(compensate_on_rank(root, "out"))
    from megascore.cli import main

    paths = [str(root / "plan.yaml"), str(files.parent), str(root / "new")]
    assert main(["prune", *paths, "--compensate=least_squares"]) == 2
    assert main(["prune", *paths, "--config", str(root / "job.yaml")]) == 2
