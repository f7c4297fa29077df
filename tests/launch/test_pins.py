"""The versions that the scripts ask pip for: the pure part, on made-up projects, packages and indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from launch import pins
from launch.pins import Package

pytestmark = pytest.mark.fast

PROJECT: dict[str, Any] = {
    "build-system": {"requires": ["setuptools>=77"]},
    "project": {
        "name": "megascore",
        "requires-python": ">=3.10,<3.13",
        "dependencies": ["numpy>=1.26,<3"],
        "optional-dependencies": {
            "megatron": ["megatron-core>=0.15,<0.20"],
            "data": ["datasets>=3.0", "numpy>=1.27"],
            "dev": ["megascore[megatron,data]", "pytest>=8", "setuptools>=77"],
        },
    },
}
PYTHONS = ["3.10", "3.11", "3.12"]


def test_extras_that_name_others_bring_their_requirements() -> None:
    assert pins.requirements_of(PROJECT, []) == ["setuptools>=77", "numpy>=1.26,<3"]
    assert set(pins.requirements_of(PROJECT, ["dev"])) == {
        *("setuptools>=77", "numpy>=1.26,<3", "pytest>=8"),
        *("megatron-core>=0.15,<0.20", "datasets>=3.0", "numpy>=1.27"),
    }


def test_the_supported_pythons_are_those_of_the_project() -> None:
    assert pins.supported_pythons(PROJECT) == PYTHONS


@pytest.mark.parametrize(
    ("requires_python", "marker"),
    [
        (None, ""),
        (">=3.8", ""),
        (">=3.10.4", ""),
        (">=3.8,!=3.9.*", ""),
        (">=3.11", 'python_version >= "3.11"'),
        (">=3.9,<3.12", 'python_version <= "3.11"'),
        ("==3.11.*", 'python_version >= "3.11" and python_version <= "3.11"'),
    ],
)
def test_a_version_is_pinned_for_the_pythons_that_can_install_it(requires_python: str | None, marker: str) -> None:
    assert pins.marker_of(requires_python, PYTHONS) == marker


@pytest.mark.parametrize("requires_python", [">=3.13", "!=3.11.*"])
def test_a_version_for_no_range_of_pythons_is_refused(requires_python: str) -> None:
    with pytest.raises(ValueError, match="no range"):
        pins.marker_of(requires_python, PYTHONS)


def test_all_but_torch_pip_and_the_project_is_pinned() -> None:
    packages = {
        "torch": Package("torch", "2.13.0+cpu"),
        "pip": Package("pip", "23.2"),
        "megascore": Package("megascore", "0.1.0"),
        "numpy": Package("numpy", "2.4.6", ">=3.11"),
        "jinja2": Package("Jinja2", "3.1.6+local", ">=3.7"),
    }
    text = pins.pins_text(packages, PYTHONS, "2026-01-02", "Python 3.11.7")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.splitlines()[len(header) :] == ["jinja2==3.1.6", 'numpy==2.4.6; python_version >= "3.11"']
    assert "Made by: bash launch/pin.sh" in text
    assert "on 2026-01-02 with Python 3.11.7." in text
    assert "3.10-3.12" in text


def test_the_oldest_is_the_first_that_every_range_allows_and_the_index_has() -> None:
    index = {"numpy": ["2.0", "1.27", "1.26"], "datasets": ["4.0", "3.1", "3.1rc1", "2.9"], "old": ["1.0"]}
    lines = ["numpy>=1.26,<3", "numpy>=1.27", "datasets>=3.0", 'old>=1; python_version < "3"']
    assert pins.oldest_pins(lines, index.__getitem__) == ["datasets==3.1", "numpy==1.27"]
    with pytest.raises(ValueError, match="no wheel of datasets>=5"):
        pins.oldest_pins(["datasets>=5"], index.__getitem__)


def test_what_torch_needs_goes_before_a_pin_and_is_told() -> None:
    torch = Package("torch", "2.6.0+cpu", requires=("sympy==1.13.1", "filelock", 'extra-one==1; extra == "x"'))
    told: list[str] = []
    lines = ["# comment", "", "filelock==4.3.1", "sympy==1.14.0", "extra-one==2", "torch==2.13.0"]
    found = pins.constraints_for(lines, {"torch": torch}, False, told.append)
    assert found == ["torch==2.6.0+cpu", "filelock==4.3.1", "extra-one==2"]
    assert told == ["torch 2.6.0+cpu needs sympy==1.13.1; tested with 1.14.0"]


@pytest.mark.parametrize(("keep", "expected"), [(False, ["numpy==2.4.6", "rich==15.0.0"]), (True, [])])
def test_packages_that_are_there_stay_where_that_is_asked(keep: bool, expected: list[str]) -> None:
    names = {"torch": "2.10.0", "numpy": "1.26.4", "rich": "15.0.0"}
    told: list[str] = []
    found = pins.constraints_for(
        ["numpy==2.4.6", "rich==15.0.0"], {name: Package(name, v) for name, v in names.items()}, keep, told.append
    )
    assert found == ["torch==2.10.0", *expected]
    assert told == (["numpy 1.26.4 stays as it is here; tested with 2.4.6"] if keep else [])


def test_a_package_that_is_there_and_too_old_is_replaced_by_the_pin() -> None:
    packages = {"torch": Package("torch", "2.10.0"), "rich": Package("rich", "9.0"), "numpy": Package("numpy", "2.0.0")}
    told: list[str] = []
    lines = ["rich==15.0.0", "numpy==2.4.6"]
    found = pins.constraints_for(lines, packages, True, told.append, ["rich>=13", "numpy>=1.26"])
    assert found == ["torch==2.10.0", "rich==15.0.0"]
    assert told[0] == "rich 9.0 is not what pyproject.toml asks for: taking 15.0.0"


def test_the_file_of_pins_meets_every_range() -> None:
    lines = Path("launch/constraints.txt").read_text().splitlines()
    found = {pin.name: pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    wanted = [Requirement(line) for line in pins.requirements_of(pins.read_project(), ["dev"])]
    assert "Made by: bash launch/pin.sh" in "\n".join(lines)
    assert not {"torch", "megascore", "pip"} & set(found)
    for requirement in wanted:
        if requirement.name != "torch":
            pin = found[requirement.name.lower()]
            assert str(pin.specifier).removeprefix("==") in requirement.specifier, f"{pin}: {requirement}"


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("before\n")
    bad = {"torch": Package("torch", "2.13.0"), "odd": Package("odd", "1.0", ">=3.13")}
    monkeypatch.setattr(pins, "installed_packages", lambda: bad)
    with pytest.raises(ValueError, match="no range"):
        pins.main(["write", str(path)])
    assert path.read_text() == "before\n"
    del bad["odd"]
    assert pins.main(["write", str(path)]) == 0
    assert path.read_text().startswith("# What bash launch/quickstart.sh")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["write"], ["requirements", "dev", "more"]])
def test_a_wrong_command_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pins.main(arguments) == 2
    assert "python launch/pins.py requirements EXTRAS" in capsys.readouterr().err
