"""Tests of this folder need one GPU; they come last, for CPU tests refuse a process that has used CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDER in item.path.parents)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here that torch can use: tests/gpu needs one")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[list[str]]:
    """Tell what makes the host wait for the device: "error" raises there, "warn" lists the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told: list[str] = []
        # That the mode is a prototype is told when it is set.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield told
        finally:
            torch.cuda.set_sync_debug_mode("default")
            told.extend(str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message))
