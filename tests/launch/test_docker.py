"""The images' parts, run outside of a container, as images can't be built where these tests run.

Packages are empty wheels made here, installed without a network into copies of one virtual environment, which stands
in for a base image: only pip and the scripts are real.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
CONSTRAINTS = REPOSITORY / "launch/constraints.txt"
PINS = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
VERSIONS = {pin.name: str(pin.specifier).removeprefix("==") for pin in PINS}
# What pip takes of the index below: that version, or a newer one where the pin is not for this Python.
TAKEN = {
    pin.name: VERSIONS[pin.name] + ("" if pin.marker is None or pin.marker.evaluate() else ".post1") for pin in PINS
}
# As NVIDIA's images have them: local versions, and one that only this image has.
BASE = {
    "torch": "2.10.0a0+b4e4ee81d3.nv25.12",
    "apex": "0.1",
    "transformer_engine": "2.10.0+abc",
    "numpy": "1.26.4",
    "packaging": "25.0",
}


def path_beside_python() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def make_wheel(folder: Path, name: str, version: str, marker: str = "", requires: tuple[str, ...] = ()) -> Path:
    """Write a wheel with one module, which says where it is from."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\nmarker = {marker!r}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_in_archive, text in files.items():
            archive.writestr(name_in_archive, text)
    return path


def run(*command: str | Path, python: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [str(word) for word in command],
        env=kept
        | {"PYTHON": str(python), "PIP_ROOT_USER_ACTION": "ignore", "PIP_CONFIG_FILE": os.devnull}
        | environment,
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def installed(python: Path) -> dict[str, str]:
    code = "import importlib.metadata as m\nfor d in m.distributions(): print(d.name, d.version)"
    result = run(python, "-c", code, python=python)
    return {canonicalize_name(name): version for name, version in map(str.split, result.stdout.splitlines())}


@pytest.fixture(scope="module")
def megascore_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real wheel, built by the images' script from what .dockerignore lets through of the files it needs."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "megascore", source / "megascore", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "docker").mkdir()
    shutil.copy(DOCKER / "build_wheel.sh", source / "docker")
    result = run("bash", source / "docker/build_wheel.sh", source / "wheels", python=Path(sys.executable))
    assert result.returncode == 0, result.stderr
    [wheel] = (source / "wheels").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is pinned, and newer versions, also of what the base has, that pip would take if it could."""
    folder = tmp_path_factory.mktemp("index")
    for name, version in VERSIONS.items():
        make_wheel(folder, name, version)
        make_wheel(folder, name, f"{version}.post1")
    for name in ("torch", "apex", "transformer_engine"):
        make_wheel(folder, name, "9.0", marker="from the index")
    return folder


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("base") / "environment"
    venv.create(prefix, with_pip=True)
    return prefix


@pytest.fixture
def python(empty_environment: Path, tmp_path: Path) -> Path:
    """The Python of a fresh environment that has nothing but pip."""
    return Path(shutil.copytree(empty_environment, tmp_path / "environment", symlinks=True)) / "bin" / "python"


def install_base(python: Path, folder: Path, packages: dict[str, str]) -> None:
    wheels = [make_wheel(folder, name, version, marker="from the base") for name, version in packages.items()]
    result = run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels, python=python)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=path_beside_python())
    if hadolint is None:
        pytest.skip("hadolint is missing: pip install -e '.[dev]' brings it where there is a build of it")
    result = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_pass_shellcheck_and_explain_themselves(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=path_beside_python())
    assert shellcheck, "shellcheck is missing: pip install -e '.[dev]' brings it"
    result = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    result = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: ")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_and_runs_is_there_and_let_through(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for word in line.split()]
    assert {"pyproject.toml", "README.md", "megascore", "launch", "docker/entrypoint.sh"} <= set(sources)
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert source.partition("/")[0] in allowed
    for name in re.findall(r"/tmp/docker/(\S+\.sh)", text):
        assert (DOCKER / name).exists()
    mounted = re.findall(r"--mount=type=bind,source=(\S+?),target=", text)
    assert {"docker", "launch", "launch/constraints.txt"} <= set(mounted)
    for source in mounted:
        assert (REPOSITORY / source).exists()
        assert source.partition("/")[0] in allowed
    assert re.search(r"^USER [1-9]\d*$", text, re.M), "the image runs as root"
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)
    for image in re.findall(r"^FROM (\S+)", text, re.M):
        assert re.search(r":(\d|\$\{BASE_TAG\})", image), f"{image} is not pinned"


def test_every_requirement_has_a_pin_that_meets_it(megascore_wheel: Path) -> None:
    with zipfile.ZipFile(megascore_wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = email.message_from_bytes(archive.read(path)).get_all("Requires-Dist", [])
    [extras] = re.findall(r"\[([a-z,]+)\]", (DOCKER / "install.sh").read_text())
    requirements = [Requirement(line) for line in lines]
    needed = [
        requirement
        for requirement in requirements
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras.split(","))
    ]
    assert {"torch", "megatron-core", "transformers"} <= {requirement.name for requirement in needed}
    for requirement in needed:
        if requirement.name != "torch":
            assert requirement.name in VERSIONS, f"launch/constraints.txt has no pin for {requirement}"
            version = VERSIONS[requirement.name]
            assert version in requirement.specifier, f"the pin {version}: {requirement}"


def test_nothing_of_the_base_is_replaced(python: Path, index: Path, megascore_wheel: Path, tmp_path: Path) -> None:
    install_base(python, tmp_path / "base-wheels", BASE)
    before = installed(python)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    result = run("bash", DOCKER / "install.sh", megascore_wheel.parent, python=python, **offline)
    assert result.returncode == 0, result.stderr + result.stdout
    after = installed(python)
    assert {name: after[name] for name in before} == before
    assert after["megatron-core"] == TAKEN["megatron-core"]
    assert after["transformers"] == TAKEN["transformers"]
    assert "megascore" in after
    code = "import torch, apex, transformer_engine as te; print(torch.marker, apex.marker, te.marker, sep='\\n')"
    assert run(python, "-c", code, python=python).stdout.splitlines() == ["from the base"] * 3


def test_a_base_that_cannot_meet_a_requirement_stays_and_is_named(
    python: Path, index: Path, megascore_wheel: Path, tmp_path: Path
) -> None:
    install_base(python, tmp_path / "base-wheels", BASE | {"omegaconf": "2.3.0"})
    before = installed(python)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    result = run("bash", DOCKER / "install.sh", megascore_wheel.parent, python=python, **offline)
    assert result.returncode != 0
    assert "omegaconf==2.3.0" in result.stdout + result.stderr
    assert installed(python) == before


def test_the_small_image_has_the_cpu_build_of_torch(
    python: Path, index: Path, megascore_wheel: Path, tmp_path: Path
) -> None:
    [version] = re.findall(r"^ARG TORCH=(\S+)$", (DOCKER / "Dockerfile.cpu").read_text(), re.M)
    wheel = make_wheel(
        tmp_path / "pytorch" / "torch", "torch", f"{version}+cpu", requires=("filelock", "setuptools>=77")
    )
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    script = DOCKER / "install_torch_cpu.sh"
    result = run("bash", script, version, python=python, TORCH_INDEX=(tmp_path / "pytorch").as_uri())
    assert result.returncode == 0, result.stderr
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    result = run("bash", DOCKER / "install.sh", megascore_wheel.parent, python=python, **offline)
    assert result.returncode == 0, result.stderr
    after = installed(python)
    assert after["torch"] == f"{version}+cpu"
    assert after["filelock"] == TAKEN["filelock"], "what torch needs was not added"
    assert after["setuptools"] == TAKEN["setuptools"], "Python's own setuptools is too old for torch"
    assert after["numpy"] == TAKEN["numpy"]


def test_a_change_of_the_base_is_seen(python: Path, tmp_path: Path) -> None:
    install_base(python, tmp_path / "base-wheels", BASE)
    script, snapshot = DOCKER / "base_packages.py", tmp_path / "base.json"
    assert run(python, script, "snapshot", snapshot, python=python).returncode == 0
    assert run(python, script, "check", snapshot, python=python).returncode == 0
    # A copy that comes first on the path hides the base's without touching it.
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "apex.py").touch()
    hidden = run(python, script, "check", snapshot, python=python, PYTHONPATH=str(tmp_path / "hiding"))
    assert hidden.returncode == 1
    assert "import apex: origin was" in hidden.stderr
    install_base(python, tmp_path / "base-wheels", {"torch": "2.13.0"})
    changed = run(python, script, "check", snapshot, python=python)
    assert changed.returncode == 1
    assert "torch: version was 2.10.0a0+b4e4ee81d3.nv25.12, is 2.13.0" in changed.stderr


def test_without_torch_the_base_is_refused(python: Path, megascore_wheel: Path) -> None:
    result = run("bash", DOCKER / "install.sh", megascore_wheel.parent, python=python)
    assert result.returncode == 2
    assert result.stderr == "error: the base has no torch\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["echo", "a b", "c"], "a b c\n"),
        (["--nproc-per-node", "2", "-m", "megascore"], "python3 /agents/agent.py --nproc-per-node 2 -m megascore\n"),
        ([], "megascore --help\n"),
    ],
)
def test_the_entry_point_becomes_the_command_or_torchrun(arguments: list[str], expected: str, tmp_path: Path) -> None:
    for name in ("python3", "megascore"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MEGASCORE_LAUNCH": "/agents"}
    result = subprocess.run(
        ["bash", DOCKER / "entrypoint.sh", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == expected


def test_the_entry_point_goes_through_that_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "nvidia_entrypoint.sh"
    base.write_text('#!/bin/sh\necho compatibility set up\nexec "$@"\n')
    base.chmod(0o755)
    result = subprocess.run(
        ["bash", DOCKER / "entrypoint.sh", "echo", "run"],
        env=os.environ | {"MEGASCORE_BASE_ENTRYPOINT": str(base)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "compatibility set up\nrun\n"


def test_the_entry_point_leaves_signals_and_exit_code_to_the_command() -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('up', flush=True); signal.pause()"
    )
    process = subprocess.Popen(
        ["bash", DOCKER / "entrypoint.sh", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.stdout.close()
