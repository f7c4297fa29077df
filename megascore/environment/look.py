"""A look at this machine: torch and what it brings, GPUs, packages, and what follows from them."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megascore.environment.optional_paths import OptionalPath, optional_paths
from megascore.environment.packages import Package, find_packages
from megascore.versions import installed_versions

__all__ = ["Device", "Environment", "look_around"]


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Environment:
    """All that was found."""

    versions: Mapping[str, str | None]
    """Of Python, torch and what torch brings; None for what this torch was built without."""
    packages: Sequence[Package]
    devices: Sequence[Device]
    notes: Sequence[str]
    """What torch warned of."""
    paths: Sequence[OptionalPath]


def look_around() -> Environment:
    """Find packages and devices. Not collective; takes as long as the slowest import.

    Imports nothing into this process but torch, and raises nothing because of what it finds.
    """
    packages = find_packages()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices = _devices()
    notes = [str(warning.message).strip().splitlines()[0] for warning in caught]
    paths = list(optional_paths(packages, has_gpu=bool(devices), has_nccl=_has_nccl()))
    return Environment(_versions(), list(packages.values()), devices, notes, paths)


def _versions() -> dict[str, str | None]:
    # A CPU build has no such functions, and answers with these errors.
    try:
        nccl: str | None = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError, ImportError):
        nccl = None
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None  # type: ignore[no-untyped-call]
    own = installed_versions()
    backends = {"gloo": dist.is_available() and dist.is_gloo_available(), "NCCL": _has_nccl()}
    return {
        "megascore": own["megascore"],
        "Python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": None if cudnn is None else str(cudnn),
        "NCCL": nccl,
        "backends": ", ".join(name for name, is_there in backends.items() if is_there) or None,
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }


def _has_nccl() -> bool:
    return dist.is_available() and dist.is_nccl_available()


def _devices() -> list[Device]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Device(each.name, each.total_memory) for each in properties]
