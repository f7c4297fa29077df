"""Fused kernels give the numbers of a loop in float64, and compile for the GPUs that people have; without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megascore.kernels import pairs_of_rows
from megascore.kernels.fused_cosines import can_fuse
from tests.kernels.fused_cases import ARCHITECTURES, oracle

TRITON = "3.9.0"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def triton_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with triton, which must not be on the path of the other tests."""
    folder = tmp_path_factory.mktemp("triton")
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "0", "--timeout", "10", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    try:
        result = subprocess.run([*command, f"triton=={TRITON}"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"triton {TRITON} can't be downloaded here: no answer in time")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"triton {TRITON} can't be downloaded here: {last}")
    return folder


def run_cases(what: str, folder: Path, cache: Path) -> dict[str, Any]:
    own = {"TRITON_INTERPRET": "1"} if what == "interpret" else {}
    environment = {**os.environ, **own, "PYTHONPATH": f"{ROOT}:{folder}", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.fused_cases", what],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_in_the_interpreter_the_cosines_are_those_of_a_loop_in_float64(triton_folder: Path, tmp_path: Path) -> None:
    errors = run_cases("interpret", triton_folder, tmp_path)
    assert errors
    # Three float32 sums of numbers of one sign, in lanes that are added in pairs: a few roundings of 6e-8.
    assert {case: error for case, error in errors.items() if not error < 1e-6} == {}


def test_they_compile_for_each_architecture(triton_folder: Path, tmp_path: Path) -> None:
    sizes = run_cases("compile", triton_folder, tmp_path)
    assert len(sizes) == 3 * len(ARCHITECTURES)
    assert min(sizes.values()) > 0


def test_without_a_gpu_none_is_chosen() -> None:
    x = torch.ones(2, 3)
    assert not can_fuse(x, x)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_where_one_is_chosen_masked_tokens_add_nothing(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_of_rows, "can_fuse", lambda x, y: True)
    monkeypatch.setattr(pairs_of_rows, "cosines", lambda x, y: oracle(x, y).float())
    x, y = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.arange(15).view(5, 3) % 4 > 0 if masked else None
    if mask is not None:
        x[~mask] = torch.nan
    whole = pairs_of_rows.sum_of_cosines(x.transpose(0, 1), y.transpose(0, 1), None if mask is None else mask.T)
    kept = torch.ones(15, dtype=torch.bool) if mask is None else mask.reshape(-1)
    expected = oracle(x.reshape(15, 16)[kept], y.reshape(15, 16)[kept]).sum()
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
