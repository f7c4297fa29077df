"""Checkpoint folders that are read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megascore.errors import ModelError
from megascore.weights.checkpoint import INDEX, CheckpointFolder


@pytest.mark.parametrize("weight_map", [[], ["a.safetensors"], "a.safetensors", 3, None, {"a": 1}, {"a": ["b"]}])
def test_an_index_that_maps_no_names_to_files_is_told(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="index.json is no index of weights: its weight_map is not one of"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b"\xff"])
def test_an_index_that_is_none_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ModelError, match="index.json is no index of weights .*Take a good copy"):
        CheckpointFolder(tmp_path)
