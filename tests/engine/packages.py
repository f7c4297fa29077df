"""Transformer Engine and other versions of Megatron-Core, each from the package index into a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["fetch_engine"]


def fetch_engine(version: str, folder: Path) -> Path:
    """Return a folder with the Python code of a Transformer Engine, and what that imports unasked, to be put on a path.

    Never on that of a process without the shim: beside this package alone Megatron-Core can't be imported.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--only-binary", ":all:", "--retries", "0", "--timeout", "10", "--target", str(folder)]
    try:
        result = subprocess.run(
            [*command, *options, f"transformer_engine=={version}", "einops"], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"transformer_engine {version} can't be downloaded here: no answer in time")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"transformer_engine {version} can't be downloaded here: {last}")
    return folder
