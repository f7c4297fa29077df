"""The same scores with every supported Megatron-Core, each from the package registry, beside the installed torch.

Also versions that ask for a newer Python than this one may be taken: they are pure Python, where it is used here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megascore.environment import SUPPORTED_MEGATRON
from tests.models import save_checkpoint
from tests.pool import WorkerPool
from tests.versions.cases import score_cases

REPOSITORY = Path(__file__).parents[2]
VERSIONS = [f"0.{minor}" for minor in range(SUPPORTED_MEGATRON[0][1], SUPPORTED_MEGATRON[1][1])]
TOLERANCE = 1e-12
"""The same formulas in float64 in the same layout; sums may be taken in another order."""
ROUTED_TOLERANCE = 1e-6
"""From 0.18 on the router's sigmoid is taken in float32, whatever the model's type."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Made here, as transformers does not bear a stand-in for triton, which some versions need.
    return str(save_checkpoint(tmp_path_factory.mktemp("versions") / "qwen3", "qwen3"))


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: str) -> dict[str, Tensor]:
    """Scores with the installed version, which the other tests check against formulas."""
    _, scores = world.run(2, score_cases, checkpoint)[0]
    return dict(scores)


def download(version: str, folder: Path) -> Path:
    """Return a folder with the newest ``version`` of Megatron-Core alone, to be put on the path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--only-binary", ":all:", "--python-version", "3.12", "--dest", str(folder)]
    try:
        result = subprocess.run(
            [*command, *options, "--retries", "0", "--timeout", "10", f"megatron-core=={version}.*"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"megatron-core {version} can't be downloaded here: no answer in time")
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"megatron-core {version} can't be downloaded here: {last}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_supported_version_gives_the_same_scores(
    version: str, checkpoint: str, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    if metadata.version("megatron-core").startswith(f"{version}."):
        pytest.skip(f"megatron-core {version} is the installed one, with which all other tests run")
    site, output = download(version, tmp_path), tmp_path / "scores.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.versions.cases", checkpoint, str(output)]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    with safe_open(output, "pt") as file:
        assert file.metadata()["version"].startswith(f"{version}.")
    scores = load_file(output)
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        rtol = ROUTED_TOLERANCE if "experts: " in key else TOLERANCE
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_the_package_asks_for_the_versions_that_are_tried() -> None:
    (low, high), text = SUPPORTED_MEGATRON, (REPOSITORY / "pyproject.toml").read_text()
    asked = re.search(r'"megatron-core>=([\d.]+),<([\d.]+)"', text)
    assert asked is not None
    assert asked.groups() == (".".join(map(str, low)), ".".join(map(str, high)))
