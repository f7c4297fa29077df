"""Warnings that fail a test: those about calls of this project, not those of other libraries about themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# One module calls another, which warns: of itself (stacklevel 1) or of the call (2).
TEST = """
def load(name, code, **names):
    scope = names | {{"__name__": name}}
    exec(code, scope)
    return scope

LIBRARY = "import warnings\\ndef function(): warnings.warn('the library warns', FutureWarning, stacklevel={stacklevel})"

def test_call():
    load("{caller}", "function()", function=load("library", LIBRARY)["function"])
"""


def run_pytest(folder: Path, caller: str, stacklevel: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one test with the settings of this project."""
    (folder / "test_call.py").write_text(TEST.format(caller=caller, stacklevel=stacklevel))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", REPOSITORY / "pyproject.toml"]
    return subprocess.run(
        [*command, f"--rootdir={folder}", *options, folder], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("caller", ["megascore", "megascore.runs.scoring_run", "tests.models", "launch.smollm2"])
def test_a_warning_about_a_call_of_ours_fails(caller: str, tmp_path: Path) -> None:
    result = run_pytest(tmp_path, caller, 2)
    assert result.returncode == 1, result.stdout
    assert "FutureWarning: the library warns" in result.stdout


@pytest.mark.parametrize(("caller", "stacklevel"), [("megascore.runs.scoring_run", 1), ("other", 2), ("megascored", 2)])
def test_a_warning_of_a_library_about_itself_is_shown(caller: str, stacklevel: int, tmp_path: Path) -> None:
    result = run_pytest(tmp_path, caller, stacklevel)
    assert result.returncode == 0, result.stdout
    assert "FutureWarning: the library warns" in result.stdout
    assert "1 passed, 1 warning" in result.stdout


def test_no_warning_fails_on_other_versions(tmp_path: Path) -> None:
    options = re.search(r'-m pytest .*(-W \S+) "\$@"', (REPOSITORY / "launch/test.sh").read_text())
    assert options is not None
    result = run_pytest(tmp_path, "megascore.runs.scoring_run", 2, *options[1].split())
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 warning" in result.stdout
