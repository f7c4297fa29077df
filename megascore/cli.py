"""The command line: ``megascore score``, ``show``, ``compare``, ``status`` and ``env``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

import megascore
from megascore.config import load_config
from megascore.environment import look_around, render_environment
from megascore.errors import MegascoreError
from megascore.process.failures import run_and_report
from megascore.process.launcher import ending_with_launcher
from megascore.resume.progress_file import RunState, read_status
from megascore.scores.compare import compare, render_comparison
from megascore.scores.report import render_scores
from megascore.scores.score_file import load_scores

__all__ = ["main", "make_parser"]

BEYOND_TOLERANCE = 1
CODE_OF_STATE = {
    RunState.FINISHED: 0,
    RunState.STOPPED: 4,
    RunState.INTERRUPTED: 4,
    RunState.RUNNING: 5,
    RunState.FAILED: 6,
}

_EXIT_CODES = """\
exit codes:
  0  the result is whole
  1  compare: a difference beyond --tolerance, or keys, lengths or unseen entries that don't match;
     also any error that megascore doesn't know (with a traceback)
  2  usage, or an error that its text explains: config, data, model, layout, score file
  3  score: this rank stopped because another one failed; the other's error is the one to read
  4  status: the run was stopped or interrupted, and the same command goes on with it
  5  status: the run is going on
  6  status: the run failed, by an error that has to be mended first
 75  score: stopped by SIGTERM or SIGUSR1 with everything saved, or also by SIGINT while ranks were still joining;
     the same command goes on

MEGASCORE_DEBUG=1 shows tracebacks of all errors.
"""
_EXTRA_OF_PACKAGE = {"megatron": "megatron", "transformers": "huggingface", "tokenizers": "huggingface"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code (see ``megascore --help``). Errors that megascore doesn't know come through.

    Raises:
        SystemExit: wrong usage (2), ``--help`` and ``--version`` (0).
    """
    arguments = make_parser().parse_args(argv)
    return run_and_report(lambda: int(arguments.command(arguments)), _console(sys.stderr))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it returns has the command as the function ``command``."""
    parser = argparse.ArgumentParser(
        prog="megascore",
        description="Which channels, heads, features and layers of a model matter.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megascore {megascore.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    score = commands.add_parser(
        "score",
        help="score a model; runs by itself or under torchrun",
        description="Score a model and write a score file. run.steps=0 is a dry run that lists every site.",
        epilog="Under torchrun: torchrun --nproc-per-node 2 -m megascore score CONFIG parallel.tensor=2",
    )
    score.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    score.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override config values, such as run.steps=0"
    )
    score.set_defaults(command=_score)
    show = commands.add_parser("show", help="show a score file as tables", description="Show a score file as tables.")
    show.add_argument("scores", metavar="SCORES", type=Path, help="score file")
    show.add_argument(
        "--fraction", type=_fraction, default=0.25, help="part whose first to go are named (default: 0.25)"
    )
    show.set_defaults(command=_show)
    compared = commands.add_parser(
        "compare",
        help="compare two score files",
        description="Compare two score files site by site. Without --tolerance it only reports: the exit code is 0.",
    )
    compared.add_argument("a", metavar="A", type=Path, help="score file")
    compared.add_argument("b", metavar="B", type=Path, help="score file")
    compared.add_argument(
        "--tolerance", type=_tolerance, help="largest relative difference allowed; exit code 1 beyond it"
    )
    compared.add_argument(
        "--fraction", type=_fraction, default=0.25, help="part whose overlap is taken (default: 0.25)"
    )
    compared.add_argument("--all", action="store_true", help="show every site, not only the worst")
    compared.set_defaults(command=_compare)
    status = commands.add_parser(
        "status",
        help="show how far a run with checkpoints is",
        description="Show what progress.json in a run's checkpoint folder says; the exit code tells the state.",
    )
    status.add_argument("folder", metavar="FOLDER", type=Path, help="the run's run.checkpoint_dir")
    status.set_defaults(command=_status)
    env = commands.add_parser(
        "env",
        help="show what is installed, and what that turns on",
        description="Show versions, packages and GPUs, and which optional paths they turn on or off, and why.",
    )
    env.set_defaults(command=_env)
    return parser


def _score(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    try:
        from megascore.job.job import run_job
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF_PACKAGE:
            raise
        extra = _EXTRA_OF_PACKAGE[package]
        raise MegascoreError(
            f"'megascore score' needs the package '{error.name}', which isn't installed: "
            f"pip install 'megascore[{extra}]'"
        ) from error
    with ending_with_launcher():
        run_job(config, _console(sys.stdout))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    scores = load_scores(arguments.scores)
    _console(sys.stdout).print(render_scores(scores, arguments.fraction))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    a, b = load_scores(arguments.a), load_scores(arguments.b)
    comparison = compare(a, b, arguments.fraction)
    console = _console(sys.stdout)
    console.print(f"A: {arguments.a}\nB: {arguments.b}\n", soft_wrap=True, highlight=False, markup=False)
    console.print(render_comparison(comparison, tolerance=arguments.tolerance, show_all=arguments.all))
    if arguments.tolerance is None or comparison.within(arguments.tolerance):
        return 0
    return BEYOND_TOLERANCE


def _status(arguments: argparse.Namespace) -> int:
    status = read_status(arguments.folder)
    console = _console(sys.stdout)
    for name, value in status.items():
        if value is not None:
            console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
    return CODE_OF_STATE[RunState(status["state"])]


def _env(arguments: argparse.Namespace) -> int:
    _console(sys.stdout).print(render_environment(look_around()))
    return 0


def _console(stream: TextIO) -> Console:
    # A stream that can't show a character, such as a log in the C locale, gets a '?' instead of a crash at the end.
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    width = None if stream.isatty() or "COLUMNS" in os.environ else 100
    return Console(file=stream, width=width)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1, such as 0.25")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 0, such as 1e-4")
    return value
