"""Commands that pages show, checked without running them: scripts, options, arguments and config keys exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from torch.distributed.run import get_args_parser

from megascore.cli import make_parser
from megascore.config import load_config
from tests.pages import ROOT

__all__ = ["check_command", "commands"]

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a block, without its comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def check_command(words: Sequence[str], stub: Path) -> None:
    """Fail for a command that does not exist in this form.

    Args:
        words: The command.
        stub: A config file that stands for those that only readers have.
    """
    match list(words):
        case ["bash", script, *rest]:
            _check_script(script, rest, stub)
        case ["sbatch", *rest]:
            # Slurm's own options are not known here.
            start = next(place for place, word in enumerate(rest) if word.endswith(".sbatch"))
            _check_script(rest[start], rest[start + 1 :], stub)
        case ["torchrun", *rest]:
            given = get_args_parser().parse_args(rest)
            module, arguments = given.training_script, given.training_script_args
            check_command(["python", *(["-m"] if given.module else []), module, *arguments], stub)
        case ["megascore", *rest] | ["python", "-m", "megascore", *rest]:
            _check_megascore(rest, stub)
        case ["python", "-m", "pytest", *rest]:
            _check_pytest(rest)
        case ["python", "-m", module, *rest] if module.startswith("tests."):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert [word for word in rest if word.startswith("--") and f'"{word}"' not in source] == []
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case ["pip", "install", "-e", project]:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", project)
            assert extras is not None
            assert [extra for extra in extras[1].split(",") if not re.search(rf"^{extra} = \[", PYPROJECT, re.M)] == []
        case _:
            raise AssertionError(f"no way to check the command: {shlex.join(words)}")


@cache
def _help_of(script: str) -> str:
    path = ROOT / script
    return subprocess.run(["bash", path, "--help"], check=True, capture_output=True, text=True, timeout=60).stdout


def _check_script(script: str, arguments: Sequence[str], stub: Path) -> None:
    text = _help_of(script)
    options = [word for word in arguments if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}(?![\w-])", text)] == []
    if script == "launch/test.sh":
        _check_pytest([word for word in arguments if word not in options])
    else:
        _check_overrides(None, [word for word in arguments if "=" in word and word not in options], stub)


def _check_pytest(arguments: Sequence[str]) -> None:
    place = 0
    while place < len(arguments):
        word = arguments[place]
        if word == "-m":
            assert f'"{arguments[place + 1]}: ' in PYPROJECT
        elif word not in ("-k", "-s"):
            assert (ROOT / word).exists()
        place += 2 if word in ("-m", "-k") else 1


def _check_megascore(arguments: Sequence[str], stub: Path) -> None:
    try:
        given = make_parser().parse_args(arguments)
    except SystemExit as stopped:
        if stopped.code:
            raise AssertionError(f"no command: megascore {shlex.join(arguments)}") from stopped
        return
    if "overrides" in given:
        # Keys of a config have a section, but for its scores; others are the command's own.
        overrides = [text for text in given.overrides if "." in text.partition("=")[0] or text.startswith("scores=")]
        assert given.command.__name__ != "_score" or overrides == given.overrides
        _check_overrides(given.config, overrides, stub)


def _check_overrides(config: Path | None, overrides: Sequence[str], stub: Path) -> None:
    own = config is not None and config.parts[0] == "launch"
    load_config(ROOT / config if own and config else stub, overrides)
