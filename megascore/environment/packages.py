"""Packages that are installed, and whether they work.

They are found without importing them; those that are found are then imported in processes of their own, so that one
that is broken, or that ends the process, is told of and harms nobody.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder

__all__ = ["SUPPORTED_MEGATRON", "Package", "find_packages"]

SUPPORTED_MEGATRON = ((0, 16), (0, 20))
"""The first minor version of megatron-core that is supported, and the first that is not."""
IMPORT_SECONDS = 180.0
_IMPORT = "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2])"


@dataclass(frozen=True)
class _Candidate:
    """A package that may be there."""

    name: str
    """As users know it."""
    distributions: tuple[str, ...]
    """Names under which it is installed; builds for several CUDA versions have several."""
    module: str
    """Whose presence tells that it is there."""
    imports: str
    """What is imported to see whether it works."""


_CANDIDATES = (
    # The room that uses it tells best whether this Megatron has what is needed.
    _Candidate("megatron-core", ("megatron-core",), "megatron.core", "megascore.mcore"),
    _Candidate("apex", ("apex",), "apex.normalization", "apex.normalization"),
    _Candidate(
        "Transformer Engine",
        ("transformer-engine", "transformer_engine_torch", "transformer-engine-torch"),
        "transformer_engine.pytorch",
        "transformer_engine.pytorch",
    ),
    _Candidate("Megatron-Bridge", ("megatron-bridge",), "megatron.bridge", "megatron.bridge"),
    _Candidate("grouped_gemm", ("grouped_gemm", "nv-grouped-gemm"), "grouped_gemm", "grouped_gemm"),
    _Candidate("transformers", ("transformers",), "transformers", "transformers"),
    _Candidate("safetensors", ("safetensors",), "safetensors", "safetensors.torch"),
)


@dataclass(frozen=True)
class Package:
    """A package as it was found."""

    name: str
    version: str | None
    """None where it is not there; "unknown" where nothing says."""
    problem: str | None = None
    """Why it can't be used, though something of this name is there."""

    @property
    def works(self) -> bool:
        """Whether it is there and can be used."""
        return self.version is not None and self.problem is None

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; (0, 0) where the text tells neither."""
        parts = (self.version or "").split(".")
        return (
            (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else (0, 0)
        )

    @property
    def why_not(self) -> str:
        """The reason for which it is not used."""
        if self.version is None:
            return f"{self.name} isn't installed"
        return f"{self.name} doesn't work" if self.problem else f"{self.name} {self.version}"


def find_packages() -> dict[str, Package]:
    """Return all packages that megascore can use, by name, there or not. Takes as long as the slowest import."""
    found = {candidate.name: _find(candidate) for candidate in _CANDIDATES}
    errors = _errors_of_imports([c for c in _CANDIDATES if found[c.name].works])
    return {
        name: Package(name, package.version, errors[name]) if name in errors else package
        for name, package in found.items()
    }


def _find(candidate: _Candidate) -> Package:
    """Look for a package without importing anything."""
    name, version = candidate.name, _installed_version(candidate.distributions)
    if _spec_of(candidate.module) is None:
        top = candidate.module.partition(".")[0]
        if name == "apex" and (version is not None or _spec_of(top) is not None):
            return Package(name, version or "unknown", _other_apex())
        missing = f"it is installed, but has no module {candidate.module}" if version is not None else None
        return Package(name, version, missing)
    package = Package(name, version or "unknown")
    low, high = SUPPORTED_MEGATRON
    if name == "megatron-core" and version is not None and not low <= package.release < high:
        supported = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        return Package(name, version, f"not a supported version: install one of {supported}")
    return package


def _other_apex() -> str:
    """Describe a package called apex that isn't NVIDIA's; the one on PyPI is for the web framework Pyramid."""
    try:
        summary = metadata.metadata("apex")["Summary"]
    except (metadata.PackageNotFoundError, KeyError):
        summary = None
    described = f' ("{summary}")' if summary else ""
    return (
        f"the package of that name from PyPI{described}, not NVIDIA's: it has no apex.normalization. "
        "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex, and NGC images have it"
    )


def _installed_version(distributions: Iterable[str]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _spec_of(module: str) -> ModuleSpec | None:
    """Find a module without running its parents, as importlib.util.find_spec would."""
    path: Sequence[str] | None = None
    spec = None
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:depth]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return spec


def _errors_of_imports(candidates: Sequence[_Candidate]) -> dict[str, str]:
    """Import each in a process of its own, all at once; return the errors by name."""
    processes = {
        candidate.name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _IMPORT, json.dumps(sys.path), candidate.imports],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        for candidate in candidates
    }
    problems = {name: _problem_of(process) for name, process in processes.items()}
    return {name: problem for name, problem in problems.items() if problem is not None}


def _problem_of(process: subprocess.Popen[str]) -> str | None:
    try:
        _, errors = process.communicate(timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"its import took longer than {IMPORT_SECONDS:g} s"
    if process.returncode == 0:
        return None
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    # Python's errors end with one line that has the type; a library that kills the process leaves anything.
    how = "its import fails" if process.returncode == 1 else f"its import ends with code {process.returncode}"
    return f"{how}: {last}"
