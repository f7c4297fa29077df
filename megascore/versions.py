"""Versions of what takes part in a run."""

from __future__ import annotations

import platform
from importlib import import_module, metadata

__all__ = ["installed_versions"]


def installed_versions() -> dict[str, str | None]:
    """Return the versions of megascore, torch, megatron-core and Python; None for what isn't installed."""
    packages = {name: _package_version(name) for name in ("torch", "megatron-core")}
    # The module's own: a checkout may run without being installed, or beside an older installed version.
    own = getattr(import_module("megascore"), "__version__", None)
    return {"megascore": own, **packages, "python": platform.python_version()}


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
