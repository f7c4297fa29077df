"""Findings of `megascore env`: stand-ins for packages on a path of their own, and imports in real processes."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megascore.environment import Device, Environment, OptionalPath, Package, look, look_around, render_environment
from megascore.environment.optional_paths import grouped_experts

REPOSITORY = Path(__file__).parents[1]
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Empty the path of everything but what `install(distribution, version, files)` puts there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def put(distribution: str, version: str, files: dict[str, str], summary: str = "") -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        summary_line = f"Summary: {summary}\n" if summary else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{summary_line}"
        )
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return put


def package(found: Environment, name: str) -> Package:
    return next(package for package in found.packages if package.name == name)


def path(found: Environment, name: str) -> OptionalPath:
    return next(path for path in found.paths if path.name == name)


def put_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "_devices", lambda: [Device("H1", 80 * 2**30)])


def test_nothing_but_torch_is_enough(install: Install) -> None:
    found = look_around()
    assert [package.version for package in found.packages] == [None] * len(found.packages)
    assert found.versions["torch"] == torch.__version__
    on = {path.name for path in found.paths if path.is_on}
    assert on <= {"NCCL"}
    assert "pip install 'megascore[megatron]'" in path(found, "Megatron-Core models").why


def test_apex_of_the_web_framework_is_told_from_nvidias(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch)
    install("apex", "0.9.10.dev0", {"apex/__init__.py": "import pyramid\n"}, "Pyramid toolkit to add Velruse")
    found = look_around()
    problem = package(found, "apex").problem
    assert problem is not None
    assert "Pyramid toolkit to add Velruse" in problem
    assert "not NVIDIA's" in problem
    assert "pip uninstall apex" in problem
    assert not path(found, "apex's fused norms").is_on


def test_nvidias_apex_turns_its_norms_on(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch)
    install("apex", "0.1", {"apex/__init__.py": "", "apex/normalization/__init__.py": ""})
    found = look_around()
    assert package(found, "apex") == Package("apex", "0.1")
    assert path(found, "apex's fused norms").is_on


def test_a_package_that_does_not_import_is_told_with_its_error(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gpu(monkeypatch)
    broken = "raise ImportError('libcudart.so.11: cannot open shared object file [sic]')\n"
    install(
        "transformer-engine",
        "2.9.0",
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": broken},
    )
    # Worse than an error: the process is gone.
    install("grouped_gemm", "1.1", {"grouped_gemm/__init__.py": "import os; os.kill(os.getpid(), 9)\n"})
    found = look_around()
    assert package(found, "Transformer Engine").problem == (
        "its import fails: ImportError: libcudart.so.11: cannot open shared object file [sic]"
    )
    assert package(found, "grouped_gemm").problem == "its import ends with code -9: no message"
    fused = path(found, "norms fused into linear layers")
    assert not fused.is_on
    assert "Transformer Engine doesn't work" in fused.why
    assert "cannot open shared object file [sic]" in shown(found)


def test_a_package_is_not_run_to_be_found(install: Install) -> None:
    """The parent package of a module that is looked for, too: finding takes no import."""
    install("megatron-bridge", "0.2", {"megatron/__init__.py": "raise SystemExit('ran')\n"})
    assert package(look_around(), "Megatron-Bridge").problem == "it is installed, but has no module megatron.bridge"


@pytest.mark.parametrize(("version", "problem"), [("0.15.3", "0.16 to 0.19"), ("0.20.0", "0.16 to 0.19")])
def test_a_version_of_megatron_that_is_not_supported_is_told(install: Install, version: str, problem: str) -> None:
    install("megatron-core", version, {"megatron/core/__init__.py": ""})
    found = package(look_around(), "megatron-core")
    assert found.problem is not None
    assert problem in found.problem


@pytest.mark.parametrize(
    ("engine", "legacy", "megatron", "is_on"),
    [
        ("2.9.0", None, "0.19.1", True),
        ("1.8.0", None, "0.16.1", False),
        (None, "1.1.4", "0.16.1", True),
        (None, "1.1.4", "0.17.0", False),
    ],
)
def test_grouped_experts_need_what_megatron_takes(
    engine: str | None, legacy: str | None, megatron: str, is_on: bool
) -> None:
    versions = {"Transformer Engine": engine, "grouped_gemm": legacy, "megatron-core": megatron}
    packages = {name: Package(name, version) for name, version in versions.items()}
    assert grouped_experts(packages, has_gpu=True).is_on is is_on
    assert not grouped_experts(packages, has_gpu=False).is_on


def test_gpus_are_listed_with_their_memory(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch)
    assert "GPU 0" in shown(look_around())
    assert "80.0 GiB" in shown(look_around())


def shown(found: Environment) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(render_environment(found))
    return stream.getvalue()


def test_the_command_imports_no_model_library_and_finds_what_is_installed() -> None:
    program = (
        "import sys; from megascore.cli import main; code = main(['env'])\n"
        "heavy = {'megatron', 'apex', 'transformer_engine', 'transformers'} & {n.split('.')[0] for n in sys.modules}\n"
        "assert not heavy, heavy; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    for name in ("torch", "megatron-core", "CPU stand-in", "Transformer Engine"):
        assert name in result.stdout
