"""The command line: scoring, and what comes behind it: plans, pruning, evaluation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import megascore
from megascore.cli import scoring, smaller
from megascore.cli.common import console_on
from megascore.process.failures import run_and_report

__all__ = ["main", "make_parser"]

_EXIT_CODES = """\
exit codes:
  0  the result is whole
  1  compare: a difference beyond --tolerance, or keys, lengths or unseen entries that don't match;
     also any error that megascore doesn't know (with a traceback)
  2  usage, or an error that its text explains: config, data, model, layout, score file, plan
  3  score, evaluate, search: this rank stopped because another one failed; the other's error is the one to read
  4  status: the run was stopped or interrupted, and the same command goes on with it
  5  status: the run is going on
  6  status: the run failed, by an error that has to be mended first
 75  score: stopped by SIGTERM or SIGUSR1 with everything saved, or also by SIGINT while ranks were still joining;
     the same command goes on

MEGASCORE_DEBUG=1 shows tracebacks of all errors.
"""


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
    return run_and_report(lambda: int(arguments.command(arguments)), console_on(sys.stderr))


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
    scoring.add_commands(commands)
    smaller.add_commands(commands)
    return parser
