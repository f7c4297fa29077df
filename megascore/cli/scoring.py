"""The commands ``score``, ``show``, ``compare``, ``rescore``, ``merge``, ``status`` and ``env``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megascore.cli.common import console_on, job_of_ranks
from megascore.config import load_config
from megascore.environment import look_around, render_environment
from megascore.errors import ConfigError
from megascore.resume.progress_file import RunState, read_status
from megascore.scores.compare import compare, render_comparison
from megascore.scores.report import render_scores
from megascore.scores.rescore import merge, rescore
from megascore.scores.score_file import Scores, load_scores

__all__ = ["add_commands"]

BEYOND_TOLERANCE = 1
CODE_OF_STATE = {
    RunState.FINISHED: 0,
    RunState.STOPPED: 4,
    RunState.INTERRUPTED: 4,
    RunState.RUNNING: 5,
    RunState.FAILED: 6,
}


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subparsers."""
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
    rescored = commands.add_parser(
        "rescore",
        help="add scores by other methods to a score file",
        description="Compute scores by other methods from the statistics that a score file keeps; no model is needed. "
        "A run with scores=all keeps what every method needs.",
    )
    rescored.add_argument("scores", metavar="SCORES", type=Path, help="score file")
    rescored.add_argument("wanted", metavar="target=method", nargs="+", help="such as ffn=wanda")
    rescored.add_argument("--to", metavar="FILE", type=Path, required=True, help="score file to write")
    rescored.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    rescored.set_defaults(command=_rescore)
    merged = commands.add_parser(
        "merge",
        help="merge score files of one model and different data",
        description="Add up the statistics of score files of one model: the scores are those of one run over all data.",
    )
    merged.add_argument("scores", metavar="SCORES", type=Path, nargs="+", help="score files")
    merged.add_argument("--to", metavar="FILE", type=Path, required=True, help="score file to write")
    merged.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    merged.set_defaults(command=_merge)
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


def _score(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    with job_of_ranks("score"):
        from megascore.job.job import run_job

        run_job(config, console_on(sys.stdout))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    scores = load_scores(arguments.scores)
    console_on(sys.stdout).print(render_scores(scores, arguments.fraction))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    a, b = load_scores(arguments.a), load_scores(arguments.b)
    comparison = compare(a, b, arguments.fraction)
    console = console_on(sys.stdout)
    console.print(f"A: {arguments.a}\nB: {arguments.b}\n", soft_wrap=True, highlight=False, markup=False)
    console.print(render_comparison(comparison, tolerance=arguments.tolerance, show_all=arguments.all))
    if arguments.tolerance is None or comparison.within(arguments.tolerance):
        return 0
    return BEYOND_TOLERANCE


def _rescore(arguments: argparse.Namespace) -> int:
    wanted = []
    for text in arguments.wanted:
        target, separator, method = text.partition("=")
        if not separator:
            raise ConfigError(f"'{text}' is not target=method: expected such as ffn=wanda.")
        wanted.append({"target": target, "method": method})
    return _write(rescore(load_scores(arguments.scores), wanted), arguments)


def _merge(arguments: argparse.Namespace) -> int:
    return _write(merge([load_scores(path) for path in arguments.scores]), arguments)


def _write(scores: Scores, arguments: argparse.Namespace) -> int:
    scores.save(arguments.to, arguments.overwrite)
    console = console_on(sys.stdout)
    console.print(f"Scores written to {arguments.to}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    status = read_status(arguments.folder)
    console = console_on(sys.stdout)
    for name, value in status.items():
        if value is not None:
            console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
    return CODE_OF_STATE[RunState(status["state"])]


def _env(arguments: argparse.Namespace) -> int:
    console_on(sys.stdout).print(render_environment(look_around()))
    return 0


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
