"""``megascore env``: packages and devices of this machine, and the optional paths of megascore that they turn on."""

from __future__ import annotations

from megascore.environment.look import Device, Environment, look_around
from megascore.environment.optional_paths import OptionalPath
from megascore.environment.packages import SUPPORTED_MEGATRON, Package
from megascore.environment.report import render_environment

__all__ = [
    "SUPPORTED_MEGATRON",
    "Device",
    "Environment",
    "OptionalPath",
    "Package",
    "look_around",
    "render_environment",
]
