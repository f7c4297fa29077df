"""JSON in a run's folder that Python's parser has no ordinary error for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascore.errors import CheckpointError
from megascore.files.locks import owner_of
from megascore.files.tensor_file import DamagedFile, decode
from megascore.resume.progress_file import PROGRESS_NAME, read_status

pytestmark = pytest.mark.fast

ODD = {
    "nested deeply": "[" * 200_000,
    "a number of many digits": "9" * 10_000,
    "half a character": '{"state": "\\ud800"}',
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_progress_file_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / PROGRESS_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="is not a run's progress file"):
        read_status(tmp_path)


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_lock_file_names_no_owner(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    assert owner_of(tmp_path / "lock") is None


@pytest.mark.parametrize("name", ["nested deeply", "a number of many digits"])
def test_the_header_of_a_tensor_file_is_refused(name: str) -> None:
    header = ODD[name].encode()
    with pytest.raises(DamagedFile, match="can't be read as safetensors"):
        decode("scores", len(header).to_bytes(8, "little") + header)
