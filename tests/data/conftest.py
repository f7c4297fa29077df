"""One import of Megatron, outside of any test: what its modules warn of on import would be errors inside."""

from __future__ import annotations

from pathlib import Path

import pytest

import megascore.job.job  # noqa: F401
from tests.data.data_files import save_tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A folder with a tokenizer that has one token for each word."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder)
    return folder
