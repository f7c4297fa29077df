"""Imports that rooms may make, seen from a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import megascore

PACKAGE = Path(megascore.__file__).parent

HEAVY = ("megatron", "transformer_engine", "apex", "transformers", "datasets")

PROGRAM = """
import importlib, sys
for room in sys.argv[2:]:
    importlib.import_module(room)
    for library in sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[1].split(","))):
        print(room, "imports", library)
"""


def test_rooms_outside_mcore_and_job_import_no_model_library() -> None:
    rooms = [
        "megascore",
        "megascore.hooks",
        "megascore.parallel.merge",
        "megascore.capture",
        "megascore.config",
        "megascore.data",
        "megascore.weights.huggingface",
        "megascore.resume.checkpointing",
        "megascore.runs.scoring_run",
        "megascore.blockwise.score_blocks",
        "megascore.cli",
    ]
    arguments = [sys.executable, "-c", PROGRAM, ",".join(HEAVY), *rooms]
    # The first room that is named is the one at fault.
    assert subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines() == []


PROGRAM_OF_WEIGHTS = """
import importlib, sys, types
package = types.ModuleType("megascore")
package.__path__ = [sys.argv[1]]
sys.modules["megascore"] = package
for module in sys.argv[3:]:
    importlib.import_module(module)
    loaded = [name for name in sys.modules if name.split(".")[0] in sys.argv[2].split(",")]
    for library in sorted({name.split(".")[0] for name in loaded}):
        print(module, "imports", library)
    for name in loaded:
        del sys.modules[name]
"""
"""The package itself is empty here, for its own names come from other rooms."""


def test_reading_checkpoints_takes_torch_and_safetensors_only() -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((PACKAGE / "weights").rglob("*.py"))
    ]
    assert "megascore.weights.huggingface.folder" in modules
    others = ",".join((*HEAVY, "omegaconf", "rich", "yaml"))
    arguments = [sys.executable, "-c", PROGRAM_OF_WEIGHTS, str(PACKAGE), others, *modules]
    told = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()
    # What Megatron-Bridge keeps beside a checkpoint is YAML.
    assert told == ["megascore.weights.torch_dist.run_config imports yaml"]


ROOMS = (
    "errors",
    "versions",
    "process",
    "files",
    "kernels",
    "hooks",
    "parallel",
    "sites",
    "typed_text",
    "config",
    "scores",
    "evaluation",
    "runs",
    "resume",
    "data",
    "weights",
    "plans",
    "pruning",
    "masks",
    "compensation",
    "capture",
    "blockwise",
    "mcore",
    "job",
    "environment",
    "api",
    "cli",
)
"""From the ground floor up: a room imports from those above it in this list, never from those below it."""
MCORE = ("mcore.compat", "mcore.cpu", "mcore.world", "mcore.models", "mcore.sites", "mcore.pipeline")
"""The same inside the one room that imports Megatron."""


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module of megascore that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("megascore."):
                yield node.lineno, name.removeprefix("megascore.")


def wrong_imports(names: Sequence[str], folder: Path, depth: int) -> list[str]:
    """Return the imports that run against the order of ``names``, whose first ``depth`` parts name a room."""
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts[:depth])
        if own not in names:
            continue
        for line, name in imports_of(path):
            room = ".".join(name.split(".")[:depth])
            if room in names and names.index(room) > names.index(own):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    return wrong


@pytest.mark.fast
def test_every_room_has_its_floor() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(ROOMS)
    inside = {path.stem for path in (PACKAGE / "mcore").iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert {f"mcore.{name}" for name in inside} == set(MCORE)


@pytest.mark.fast
def test_imports_run_one_way() -> None:
    assert wrong_imports(ROOMS, PACKAGE, 1) == []
    assert wrong_imports(MCORE, PACKAGE / "mcore", 2) == []


@pytest.mark.fast
def test_megatron_is_imported_in_one_room_only() -> None:
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "mcore"
        and any(line.strip().startswith(("import megatron", "from megatron")) for line in path.read_text().splitlines())
    ]
    assert wrong == []
