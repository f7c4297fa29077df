"""The pruned folder computes what the parent does with the same units masked, in transformers and in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import megascore
from tests.models import FAMILIES, save_checkpoint, tensors_of
from tests.smaller import exact, random_plan, scored, wanted_sizes

AXES = ("hidden_size", "layers", "attention_heads", "kv_heads", "ffn", "experts", "expert_ffn", "all")
CASES = [(family, axis) for family in FAMILIES for axis in AXES if axis == "all" or axis in wanted_sizes(family, "all")]
TOKENS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parents")
    return {family: save_checkpoint(root / family, family, max_shard_size="100KB") for family in FAMILIES}


@torch.no_grad()
def differ(folder: Path, plan: megascore.Plan, output: Path) -> float:
    """Return the largest difference of logits between the pruned model and the masked parent."""
    megascore.prune(folder, plan, output)
    smaller, parent = exact(output), exact(folder)
    whole = parent(TOKENS).logits
    with megascore.masked_units(parent, plan):
        masked = parent(TOKENS).logits
    assert torch.equal(parent(TOKENS).logits, whole)
    assert float((masked - whole).abs().max()) > 1e-3
    return float((smaller(TOKENS).logits - masked).abs().max())


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_a_pruned_folder_computes_what_the_masked_parent_does(
    family: str, axis: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = random_plan(folders[family], **wanted_sizes(family, axis))
    # Logits are of the order of 1, in float64.
    assert differ(folders[family], plan, tmp_path / "smaller") < 1e-9


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_keep_channels_of_their_own(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "parent", family, fused_experts=True)
    plan = random_plan(folder, **wanted_sizes(family, "all"))
    assert differ(folder, plan, tmp_path / "smaller") < 1e-9


def test_heads_with_keys_of_their_own_go_together(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "parent", "qwen2", num_key_value_heads=4)
    plan = random_plan(folder, attention_heads=3)
    assert plan.sizes_after["kv_heads"] == 3
    assert differ(folder, plan, tmp_path / "smaller") < 1e-9


def test_layers_that_stay_keep_their_windows(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = save_checkpoint(
        tmp_path / "parent", "qwen3", sliding_window=4, use_sliding_window=True, layer_types=kinds, max_window_layers=2
    )
    for seed in range(3):
        plan = random_plan(folder, seed, layers=2)
        assert differ(folder, plan, tmp_path / f"smaller{seed}") < 1e-9


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_sorted_model_computes_the_same_and_smaller_ones_are_prefixes(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    targets = ["ffn", "hidden_size", "attention_heads", "kv_heads"]
    targets += ["experts", "expert_ffn"] if family == "qwen3_moe" else []
    scores = scored(folders[family], *targets)
    scores.save(tmp_path / "scores.safetensors")
    wanted = {target: size for target, size in wanted_sizes(family, "all").items() if target in targets}
    plan = megascore.plan(
        tmp_path / "scores.safetensors", model=folders[family], same_weights=True, multiple_of=8, **wanted
    )
    megascore.prune(folders[family], plan, tmp_path / "sorted", sort_only=True)
    with torch.no_grad():
        difference = exact(tmp_path / "sorted")(TOKENS).logits - exact(folders[family])(TOKENS).logits
    # transformers' router takes its softmax in float32, over experts in another order.
    assert float(difference.abs().max()) < (1e-6 if family == "qwen3_moe" else 1e-9)
    # The most important features are the first of the sorted model.
    kept = set(plan.units.hidden_size)
    name = "model.norm.weight"
    weights = {}
    for path in (*tmp_path.glob("sorted/*.safetensors"), *folders[family].glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():
                weights[path.parent.name] = file.get_tensor(name)
    parent = weights[folders[family].name][sorted(kept)]
    assert set(weights["sorted"][: len(kept)].tolist()) == set(parent.tolist())


def test_a_folder_with_other_names_gets_the_ordinary_ones(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "parent", "llama")
    plan = random_plan(folder, hidden_size=40, layers=3)
    megascore.prune(folder, plan, tmp_path / "ordinary")
    tensors = tensors_of(folder / "model.safetensors")
    # A base model's names, and a tied embedding that is there as the output layer alone.
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed["lm_head.weight"] = renamed.pop("embed_tokens.weight")
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    megascore.prune(folder, random_plan(folder, hidden_size=40, layers=3), tmp_path / "renamed")
    first, second = (tensors_of(tmp_path / name / "model.safetensors") for name in ("ordinary", "renamed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
