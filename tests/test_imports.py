"""Which rooms may import what, seen from a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("megatron", "transformer_engine", "apex", "transformers", "datasets")

PROGRAM = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2].split(","))))
"""


@pytest.mark.parametrize(
    "room",
    [
        "megascore",
        "megascore.hooks",
        "megascore.parallel.merge",
        "megascore.capture",
        "megascore.scoring.blockwise",
        "megascore.scoring.data",
        "megascore.scoring.run",
    ],
)
def test_a_room_outside_mcore_imports_no_model_library(room: str) -> None:
    arguments = [sys.executable, "-c", PROGRAM, room, ",".join(HEAVY)]
    assert subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("hooks", {"hooks", "errors", "files"}),
        ("parallel", {"parallel", "hooks", "errors", "files"}),
        ("capture", {"capture", "hooks", "errors", "files", "closing"}),
        ("scoring", {"scoring", "parallel", "capture", "hooks", "errors", "files", "closing"}),
        ("mcore", {"mcore", "scoring", "parallel", "capture", "hooks", "errors", "files", "closing"}),
    ],
)
def test_imports_run_one_way(room: str, allowed: set[str]) -> None:
    import ast
    from pathlib import Path

    import megascore

    folder = Path(megascore.__file__).parent / room
    wrong = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "megascore" and (len(parts) == 1 or parts[1] not in allowed):
                    wrong.append(f"{path.name}:{node.lineno} imports {name}")
    assert wrong == []
