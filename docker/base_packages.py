"""Keeps what a base image brings: writes it down, makes constraints for pip of it, and checks it afterwards.

    python docker/base_packages.py snapshot FILE           write down every installed package
    python docker/base_packages.py constraints PINS        print their versions, and those PINS that are not installed
    python docker/base_packages.py check FILE              exit with 1 and say what differs from the snapshot

Runs in the image with the base's own Python, before megascore is there: the standard library and pip are all it needs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

# The packages that are built for the image's CUDA, and that a copy elsewhere on the path would hide.
MODULES = ("torch", "apex", "transformer_engine", "triton", "flash_attn", "numpy")


def normalized(name: str) -> str:
    """Return a package's name in the one form that pip compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def take_snapshot() -> dict[str, dict[str, str]]:
    """Return version, place and a checksum of the file list of every package, and where `MODULES` are imported from."""
    found: dict[str, dict[str, str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if not name:
            continue
        files = distribution.read_text("RECORD") or distribution.read_text("SOURCES.txt") or ""
        # In the order of the path: the first one is the one that is imported.
        found.setdefault(
            normalized(name),
            {
                "version": distribution.version,
                "place": str(distribution.locate_file("")),
                "files": hashlib.sha256(files.encode()).hexdigest(),
            },
        )
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            found[f"import {name}"] = {"origin": str(spec.origin)}
    return found


def constraints(pins: Path) -> list[str]:
    """Return pip constraints: every installed version, and those of the pins that are of other packages."""
    from pip._vendor.packaging.version import InvalidVersion, Version

    lines, installed = [], take_snapshot()
    for name, entry in sorted(installed.items()):
        if "version" not in entry:
            continue
        try:
            lines.append(f"{name}=={Version(entry['version'])}")
        except InvalidVersion:
            # pip can neither constrain nor replace knowingly; `check` sees what becomes of it.
            sys.stderr.write(f"{name} {entry['version']}: not a version that pip knows, left out of the constraints\n")
    for line in pins.read_text(encoding="utf-8").splitlines():
        name, separator, _ = line.partition("==")
        if separator and not line.startswith("#") and normalized(name) not in installed:
            lines.append(line)
    return lines


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """Return a line for everything of the snapshot that is gone or has changed."""
    lines = []
    for name, entry in sorted(before.items()):
        now = after.get(name)
        if now is None:
            lines.append(f"{name}: was {entry}, is gone")
            continue
        lines += [f"{name}: {key} was {entry[key]}, is {now.get(key)}" for key in entry if now.get(key) != entry[key]]
    return lines


def main(arguments: list[str]) -> int:
    """Run one of the three commands and return the exit code."""
    if len(arguments) != 2 or arguments[0] not in ("snapshot", "constraints", "check"):
        sys.stderr.write(__doc__ or "")
        return 2
    command, path = arguments[0], Path(arguments[1])
    if command == "snapshot":
        path.write_text(json.dumps(take_snapshot()), encoding="utf-8")
    elif command == "constraints":
        sys.stdout.write("\n".join([*constraints(path), ""]))
    else:
        before = json.loads(path.read_text(encoding="utf-8"))
        lines = differences(before, take_snapshot())
        if lines:
            sys.stderr.write("error: the base image's own packages were changed:\n" + "\n".join(lines) + "\n")
            return 1
        sys.stderr.write(f"all {len(before)} entries of the base are as they were\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
