"""Names of tensors: a base model's without its prefix, and tied embeddings under either of their names. Tier: pure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import megascore
from megascore.errors import ModelError
from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.names import stored_name
from megascore.weights.huggingface.sources import all_tensors
from tests.blockwise.test_score_blocks import assert_same
from tests.models import load_with_transformers, rename_tensors, save_checkpoint, tensors_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def head_alone(name: str) -> str:
    return HEAD if name == EMBEDDING else name


def first_layer_without(name: str) -> str:
    return name.removeprefix("model.") if ".layers.0." in name else name


NAMES: dict[str, Callable[[str], str | None]] = {
    "no prefix": without_prefix,
    "head alone": head_alone,
    "head alone, no prefix": lambda name: without_prefix(head_alone(name)),
    "some with a prefix": first_layer_without,
}


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the table, by its name there."""
    checkpoint = HuggingFaceCheckpoint(read_config(folder), folder)
    checkpoint.check()
    names = {own: name for name, own in checkpoint.config.stored_names.items()}
    with checkpoint.reading() as read:
        sources = all_tensors(checkpoint.config).values()
        return {names.get(source.name, source.name): read(source, None, 0, 1).clone() for source in sources}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_moe", "mixtral fused"])
def test_every_tensor_is_found_under_its_other_name(
    family: str, names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, *fused = family.split()
    folder = save_checkpoint(tmp_path / "ordinary", own, fused_experts=bool(fused))
    tied = read_config(folder).tied_embeddings
    if "head alone" in names and not tied:
        assert stored_name((HEAD,), "model", {EMBEDDING}) is None
        return
    renamed = rename_tensors(folder, tmp_path / "renamed", NAMES[names])
    with caplog.at_level(logging.WARNING, logger="megascore"):
        assert_equal(read_all(renamed), read_all(folder))
    assert not caplog.records


def test_a_base_model_as_transformers_saves_it_is_the_model_if_its_head_is_tied(tmp_path: Path) -> None:
    from transformers import AutoModel

    for family, tied in (("llama", True), ("mistral", False)):
        folder, base = save_checkpoint(tmp_path / family, family), tmp_path / f"{family} base"
        AutoModel.from_pretrained(folder, local_files_only=True).save_pretrained(base)
        with safe_open(base / "model.safetensors", framework="pt") as file:
            assert "layers.0.input_layernorm.weight" in file.keys()
        if tied:
            assert_equal(read_all(base), read_all(folder))
        else:
            with pytest.raises(ModelError, match=r"no tensor 'lm_head\.weight' of shape \[128, 64\]"):
                read_all(base)


def test_a_tensor_that_has_no_name_is_told_with_those_that_were_looked_for(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ordinary", "llama")
    for lost, others in (
        (EMBEDDING, r"\(nor as embed_tokens\.weight, lm_head\.weight\)"),
        ("model.norm.weight", r"\(nor as norm\.weight\)"),
    ):
        target = tmp_path / lost
        rename_tensors(folder, target, lambda name, lost=lost: None if name == lost else name)
        with pytest.raises(ModelError, match=rf"no tensor '{lost}' of shape .* calls for {others}: .*incomplete"):
            read_all(target)


def test_a_head_beside_an_embedding_without_prefix_must_be_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_checkpoint(tmp_path / "ordinary", "llama")
    renamed = rename_tensors(folder, tmp_path / "renamed", without_prefix)
    tensors = tensors_of(renamed / "model.safetensors")
    tensors[HEAD] = tensors["embed_tokens.weight"] + 1
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is not 'embed_tokens\.weight'"):
        read_all(renamed)


@pytest.mark.parametrize("names", NAMES)
def test_block_by_block_reads_the_same_weights_as_transformers(names: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "llama")
    batches = torch.randint(128, (2, 1, 12), generator=torch.Generator().manual_seed(0)).unbind()
    expected = megascore.score_blockwise(folder, None, batches)
    # The score file names the folder.
    ordinary = folder.rename(tmp_path / "ordinary")
    renamed = rename_tensors(ordinary, tmp_path / "model", NAMES[names])
    assert_same(megascore.score_blockwise(renamed, None, batches), expected)
    # What transformers makes of these names, which is what they mean.
    theirs = load_with_transformers(renamed, torch.float32, local_files_only=True).state_dict()
    for name, value in load_with_transformers(ordinary, torch.float32, local_files_only=True).state_dict().items():
        assert torch.equal(theirs[name], value), name
