"""The comparison of two checkouts sees what it must see, and nothing that is another on every start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.benchmarks.two_checkouts.cases import named
from tests.benchmarks.two_checkouts.compare import Differences, compare
from tests.benchmarks.two_checkouts.runner import CODES

OLD, NEW = Path("/old"), Path("/new")
VALUES = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)


def write(folder: Path, values: torch.Tensor = VALUES, code: int = 0, text: str = "", **metadata: object) -> Path:
    folder.mkdir(parents=True)
    save_file({"key": values}, folder / "scores.safetensors", {"megascore": json.dumps({"metadata": metadata})})
    (folder / CODES).write_text(json.dumps({"score": [code]}))
    (folder / "score.rank0.txt").write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "old" / "case", tmp_path / "new" / "case"


def test_times_versions_and_places_of_code_are_no_difference(folders: tuple[Path, Path]) -> None:
    old, new = folders
    write(
        old, text=f"{OLD}/megascore/a.py:12: in {old}, 1,234 tokens/s, 0.1 MB in 0.10 s", created="1", versions={"x": 1}
    )
    write(new, text=f"{NEW}/megascore/b/c.py:7: in {new}, 9 tokens/s, 0.1 MB in 2.00 s", created="2", versions={"x": 2})
    assert compare(old, new, [OLD, NEW]) == Differences(num_tensors=1)


@pytest.mark.parametrize("values", [torch.nextafter(VALUES, VALUES + 1), -VALUES.abs(), VALUES.float(), VALUES[:2]])
def test_every_bit_of_a_score_is_compared(values: torch.Tensor, folders: tuple[Path, Path]) -> None:
    old, new = folders
    found = compare(write(old), write(new, values), [OLD, NEW])
    assert len(found.scores) == 1
    assert "key" in found.scores[0]


def test_a_score_file_that_is_missing_is_a_difference(folders: tuple[Path, Path]) -> None:
    old, new = folders
    write(old)
    (write(new) / "scores.safetensors").unlink()
    assert compare(old, new, [OLD, NEW]).scores == ["scores.safetensors: only in old"]


def test_metadata_exit_codes_and_texts_are_told_apart(folders: tuple[Path, Path]) -> None:
    old, new = folders
    found = compare(write(old, num_tokens=5), write(new, code=2, text="an error", num_tokens=6), [OLD, NEW])
    assert found.scores == []
    assert found.metadata == ["scores.safetensors: megascore.metadata.num_tokens: 5 in old, 6 in new"]
    assert found.codes == ["score: [0] in old, [2] in new"]
    assert "+an error" in found.texts


def test_a_case_by_name_comes_with_those_whose_files_it_copies() -> None:
    assert [case.name for case in named("resumed on PP=2")] == ["stopped, TP=2 SP, DP=2", "resumed on PP=2"]
