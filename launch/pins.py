"""Requirements for pip, for launch/_environment.sh: the tested, the newest or the oldest that pyproject.toml allows.

    python launch/pins.py requirements EXTRAS          print what the checkout needs to be built and to run with EXTRAS
    python launch/pins.py write FILE                   pin what is installed here; FILE is written whole or not at all
    python launch/pins.py oldest EXTRAS REQUIREMENT .. print pins of the oldest versions that the ranges allow
    python launch/pins.py constraints FILE [--keep]    print the constraints for this environment: the torch that is
                                                       here, and the pins of FILE; with --keep of missing packages only

EXTRAS are names between commas. Runs in an environment that has nothing yet: the standard library and pip are enough.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

# Pip's copies only where there is nothing else: importing pip keeps setuptools from working in the same process.
try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[no-redef]
    from pip._vendor.packaging.specifiers import SpecifierSet  # type: ignore[no-redef]
    from pip._vendor.packaging.utils import canonicalize_name  # type: ignore[no-redef]
    from pip._vendor.packaging.version import Version  # type: ignore[no-redef]

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# torch is the base image's, the environment's, or the one that is asked for; pip comes with the environment.
NOT_PINNED = ("torch", "megascore", "pip")


@dataclass(frozen=True)
class Package:
    """What a distribution says of itself."""

    name: str
    version: str
    requires_python: str | None = None
    requires: tuple[str, ...] = ()


def read_project() -> dict[str, Any]:
    """Return what pyproject.toml says."""
    project: dict[str, Any] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    return project


def installed_packages() -> dict[str, Package]:
    """Return the packages of this environment by their normalized name."""
    found: dict[str, Package] = {}
    for one in metadata.distributions():
        name = one.metadata["Name"]
        if name:
            package = Package(name, one.version, one.metadata["Requires-Python"], tuple(one.requires or ()))
            # In the order of the path: the first one is the one that is imported.
            found.setdefault(canonicalize_name(name), package)
    return found


def requirements_of(project: Mapping[str, Any], extras: Iterable[str]) -> list[str]:
    """Return what building and running takes with some extras, also by way of extras that name others."""
    own, optional = project["project"], project["project"]["optional-dependencies"]
    lines, waiting, seen = [*project["build-system"]["requires"], *own["dependencies"]], list(extras), set()
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for line in optional[extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == canonicalize_name(own["name"]):
                waiting += sorted(requirement.extras)
            else:
                lines.append(line)
    return list(dict.fromkeys(lines))


def supported_pythons(project: Mapping[str, Any]) -> list[str]:
    """Return the minor versions of Python 3 that pyproject.toml allows."""
    return _allowed(project["project"]["requires-python"], [f"3.{minor}" for minor in range(100)])


def marker_of(requires_python: str | None, pythons: list[str]) -> str:
    """Return the marker of a version that some of the supported Pythons can't install; empty where all can.

    Raises:
        ValueError: those that can are none, or are not neighbours.
    """
    allowed = _allowed(requires_python or "", pythons)
    first, last = (pythons.index(allowed[0]), pythons.index(allowed[-1])) if allowed else (0, -1)
    if not allowed or pythons[first : last + 1] != allowed:
        raise ValueError(f"of Python {', '.join(pythons)}, '{requires_python}' allows {allowed}, no range")
    bounds = []
    if first > 0:
        bounds.append(f'python_version >= "{allowed[0]}"')
    if last < len(pythons) - 1:
        bounds.append(f'python_version <= "{allowed[-1]}"')
    return " and ".join(bounds)


def _allowed(requires_python: str, pythons: list[str]) -> list[str]:
    # By the last patch release of each: a package may want one of the later ones.
    return [python for python in pythons if SpecifierSet(requires_python).contains(f"{python}.99")]


def pins_text(packages: Mapping[str, Package], pythons: list[str], date: str, machine: str) -> str:
    """Return the file of constraints that pins packages."""
    lines = []
    for name, package in sorted(packages.items()):
        if name in NOT_PINNED:
            continue
        marker = marker_of(package.requires_python, pythons)
        lines.append(f"{name}=={Version(package.version).public}" + (f"; {marker}" if marker else ""))
    header = f"""\
# What bash launch/quickstart.sh, bash launch/test.sh and the images (docker/) install: every package, direct and
# transitive, at the version that the tests ran with. Made by: bash launch/pin.sh
# on {date} with {machine}.
# Not here: torch, which is the environment's or the base image's, TORCH_REQUIREMENT of launch/_environment.sh, or the
# build argument TORCH of docker/Dockerfile.cpu; megascore itself; pip.
# A version with a marker is not for the other Pythons of {pythons[0]}-{pythons[-1]}, which take the newest that their
# packages and the ranges of pyproject.toml allow; so it is with what only other Pythons or platforms need at all.
"""
    return header + "".join(f"{line}\n" for line in lines)


def oldest_pins(lines: Iterable[str], available: Callable[[str], Iterable[str]]) -> list[str]:
    """Return pins of the oldest version of each package that its requirements allow and the index has.

    Raises:
        ValueError: there is none.
    """
    wanted: dict[str, SpecifierSet] = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            name: str = canonicalize_name(requirement.name)
            wanted[name] = wanted.get(name, SpecifierSet()) & requirement.specifier
    pins = []
    for name, specifier in sorted(wanted.items()):
        released = [version for version in map(Version, available(name)) if not version.is_prerelease]
        versions = [version for version in released if specifier.contains(version)]
        if not versions:
            raise ValueError(f"the package index has no wheel of {name}{specifier} for this Python and machine")
        pins.append(f"{name}=={min(versions).public}")
    return pins


def versions_of_index(name: str) -> list[str]:
    """Return the versions of which pip's index has a wheel for this Python and machine."""
    # `pip index versions` also lists what has no wheel. What pip says when nothing matches, does not.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", f"{name}<0.dev0"]
    # Constraints of the user's would contradict that request.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"\(from versions: (.*)\)", result.stderr)
    if found is None:
        raise ValueError(f"pip tells no versions of {name}:\n{result.stderr}{result.stdout}")
    return [] if found[1] == "none" else found[1].split(", ")


def constraints_for(
    pins: Iterable[str],
    packages: Mapping[str, Package],
    keep: bool,
    tell: Callable[[str], None],
    needs: Iterable[str] = (),
) -> list[str]:
    """Return constraints for an environment that has torch: that one, and the pins.

    Args:
        pins: Lines of a file of pins.
        packages: What the environment has.
        keep: Leave packages that are there, and that the needs allow, as they are.
        tell: Called with what deviates from the pins.
        needs: What pyproject.toml asks for.
    """
    asked: dict[str, SpecifierSet] = {canonicalize_name(o.name): o.specifier for o in map(Requirement, needs)}
    torch = packages["torch"]
    needs_of_torch: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, torch.requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needs_of_torch[canonicalize_name(requirement.name)] = requirement.specifier
    lines = [f"torch=={torch.version}"]
    for line in pins:
        if not line.strip() or line.startswith("#"):
            continue
        pin = Requirement(line)
        name: str = canonicalize_name(pin.name)
        if name == "torch":
            continue
        version = str(pin.specifier).removeprefix("==")
        there, needed = packages.get(name), needs_of_torch.get(name, SpecifierSet())
        fits = there is not None and asked.get(name, SpecifierSet()).contains(there.version, prereleases=True)
        if keep and there is not None and not fits:
            tell(f"{name} {there.version} is not what pyproject.toml asks for: taking {version}")
            lines.append(line)
        elif keep and there is not None:
            if there.version != version:
                tell(f"{name} {there.version} stays as it is here; tested with {version}")
        elif not needed.contains(version):
            tell(f"torch {torch.version} needs {name}{needed}; tested with {version}")
        else:
            lines.append(line)
    return lines


def main(arguments: list[str]) -> int:
    """Run one of the commands and return the exit code."""
    known = {"requirements": (1, 1), "write": (1, 1), "oldest": (1, 99), "constraints": (1, 2)}
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in known or not known[command][0] <= len(rest) <= known[command][1]:
        sys.stderr.write(__doc__ or "")
        return 2
    if command == "requirements":
        lines = requirements_of(read_project(), rest[0].split(","))
    elif command == "write":
        _write(Path(rest[0]))
        return 0
    elif command == "oldest":
        lines = oldest_pins([*requirements_of(read_project(), rest[0].split(",")), *rest[1:]], versions_of_index)
    else:
        project = read_project()
        extras = project["project"]["optional-dependencies"]
        pins = Path(rest[0]).read_text(encoding="utf-8").splitlines()
        lines = constraints_for(
            pins, installed_packages(), "--keep" in rest[1:], _tell, requirements_of(project, extras)
        )
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _write(path: Path) -> None:
    packages = installed_packages()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    text = pins_text(packages, supported_pythons(read_project()), date, f"{machine}, torch {packages['torch'].version}")
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _tell(text: str) -> None:
    sys.stderr.write(f"==> {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
