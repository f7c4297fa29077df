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
from tests.job.resumable import Job, assert_same_scores
from tests.pool import WorkerPool
from tests.versions.cases import SCORES, score_cases
from tests.versions.jobs import JOBS, MODELS, OWN, VersionJob, full_pass, run_job, write_inputs

REPOSITORY = Path(__file__).parents[2]
VERSIONS = [f"0.{minor}" for minor in range(SUPPORTED_MEGATRON[0][1], SUPPORTED_MEGATRON[1][1])]
TOLERANCE = 1e-12
"""The same formulas in float64 in the same layout; sums may be taken in another order."""
OTHER_LAYOUT_TOLERANCE = 1e-9
"""In float64 on another layout: the rounding of sums in another order, divided by small scores."""
ROUTED_TOLERANCE = 1e-6
"""The router's softmax is taken in float32, and from 0.18 on its sigmoid, whatever the model's type."""


OF_OTHERS = {
    "dense, of the other version, TP=2": VersionJob("qwen3", ("parallel.tensor=2",), saved_by=OWN),
    "experts, of the other version, EP=2": VersionJob("qwen3_moe", ("parallel.expert=2",), saved_by=OWN),
}
"""What the installed version runs on Megatron checkpoints that another one has saved."""


@pytest.fixture(scope="module")
def inputs(world: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Made here, as transformers does not bear a stand-in for triton, which some versions need.
    folder = tmp_path_factory.mktemp("versions")
    write_inputs(world, folder)
    return folder


@pytest.fixture(scope="module")
def expected(world: WorkerPool, inputs: Path) -> dict[str, Tensor]:
    """Scores with the installed version, which the other tests check against formulas."""
    _, scores = world.run(2, score_cases, str(inputs / "qwen3"))[0]
    return dict(scores)


@pytest.fixture(scope="module")
def full_passes(world: WorkerPool, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of the installed version in one process, by family."""
    folder = tmp_path_factory.mktemp("full")
    return {family: full_pass(world, inputs, folder / family, family) for family in MODELS}


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
    version: str,
    inputs: Path,
    expected: dict[str, Tensor],
    full_passes: dict[str, Job],
    world: WorkerPool,
    tmp_path: Path,
) -> None:
    if metadata.version("megatron-core").startswith(f"{version}."):
        pytest.skip(f"megatron-core {version} is the installed one, with which all other tests run")
    site, output = download(version, tmp_path / "wheel"), tmp_path / "output"
    output.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.versions.cases", str(inputs), str(output)]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    check_cases(version, output, expected)
    for name, job in JOBS.items():
        check_job(name, Job(output / name), full_passes[job.family])
    for name, job in OF_OTHERS.items():
        check_job(name, run_job(world, inputs, output, name, job), full_passes[job.family])


def check_cases(version: str, output: Path, expected: dict[str, Tensor]) -> None:
    with safe_open(output / SCORES, "pt") as file:
        assert file.metadata()["version"].startswith(f"{version}.")
    scores = load_file(output / SCORES)
    assert scores.keys() == expected.keys()
    for key, value in scores.items():
        rtol = ROUTED_TOLERANCE if "experts: " in key else TOLERANCE
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=0, msg=lambda text, key=key: f"{key}: {text}")


def check_job(name: str, job: Job, full_pass: Job) -> None:
    rtol = ROUTED_TOLERANCE if "experts" in name else OTHER_LAYOUT_TOLERANCE
    try:
        assert_same_scores(job.scores(), full_pass.scores(), rtol)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def test_the_package_asks_for_the_versions_that_are_tried() -> None:
    (low, high), text = SUPPORTED_MEGATRON, (REPOSITORY / "pyproject.toml").read_text()
    asked = re.search(r'"megatron-core>=([\d.]+),<([\d.]+)"', text)
    assert asked is not None
    assert asked.groups() == (".".join(map(str, low)), ".".join(map(str, high)))
