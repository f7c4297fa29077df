"""The commands ``plan``, ``prune``, ``evaluate`` and ``search``: from a score file to a smaller model."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megascore.cli.common import console_on, job_of_ranks
from megascore.config import load_config
from megascore.errors import ConfigError, PlanError
from megascore.plans.plan import make_plan
from megascore.plans.request import is_plan_key, parse_request
from megascore.plans.table import render_plan
from megascore.pruning.prune import prune

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="plan a smaller model by a score file",
        description="Choose which units of a model stay, and write that as YAML that can be edited. Sizes: ffn=75%, "
        "hidden_size=1536, layers=24, attention_heads, kv_heads, experts, expert_ffn. Budgets: params=6e9, "
        "active_params=..., memory=40GiB (with batch=, length=), or a part such as params=80%; axes=ffn,layers says "
        "what meets them. Rules: multiple_of=64, tensor_parallel=, expert_parallel=, per_layer=true. "
        "method.TARGET=METHOD chooses among several; model=FOLDER names the model where the score file does not.",
    )
    plan.add_argument("scores", metavar="SCORES", type=Path, help="score file")
    plan.add_argument("wanted", metavar="key=value", nargs="+", help="sizes, budgets and rules")
    plan.add_argument("--to", metavar="PLAN", type=Path, required=True, help="YAML file to write")
    plan.add_argument("--overwrite", action="store_true", help="replace a plan that is there")
    plan.set_defaults(command=_plan)
    pruned = commands.add_parser(
        "prune",
        help="make the smaller Hugging Face folder of a plan",
        description="Write the smaller model, tensor by tensor: no GPU, no Megatron, no model in memory. The input is "
        "never changed, and the output appears whole or not at all.",
    )
    pruned.add_argument("plan", metavar="PLAN", type=Path, help="YAML file of megascore plan")
    pruned.add_argument("model", metavar="MODEL", type=Path, help="Hugging Face folder of the parent")
    pruned.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; none is there")
    pruned.add_argument(
        "--sort-only", action="store_true", help="keep everything, the most important units first: same results"
    )
    pruned.add_argument("--scores", type=Path, help="score file behind the plan, for --sort-only")
    pruned.add_argument(
        "--compensate",
        choices=("least_squares", "bias"),
        help="fit output projections again on the text of --config; runs alone or under torchrun, and goes on after "
        "a kill",
    )
    pruned.add_argument(
        "--config",
        metavar=("CONFIG", "key=value"),
        nargs="+",
        default=[],
        help="YAML file of a scoring job, for --compensate, and values that override it, such as parallel.tensor=2",
    )
    pruned.set_defaults(command=_prune)
    evaluated = commands.add_parser(
        "evaluate",
        help="say what a smaller model or a plan lost; runs by itself or under torchrun",
        description="Compare a plan (by masks in the parent) or a smaller folder with the parent on held-out text, "
        "beside the same plan with units taken at random and by weight norm. CONFIG is that of a scoring job.",
        epilog="Under torchrun: torchrun --nproc-per-node 2 -m megascore evaluate CONFIG plan=PLAN parallel.tensor=2",
    )
    evaluated.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    evaluated.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="plan=PLAN, smaller=FOLDER, baselines=random,weight_norm, json=FILE; others override config values",
    )
    evaluated.set_defaults(command=_evaluate)
    searched = commands.add_parser(
        "search",
        help="find the best plan for a budget; runs by itself or under torchrun",
        description="Evaluate plans that meet a budget by masked loss, in one start of the model. After a kill the "
        "same command goes on.",
        epilog="Under torchrun: torchrun --nproc-per-node 2 -m megascore search CONFIG SCORES params=80% --to FOLDER",
    )
    searched.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a scoring job")
    searched.add_argument("scores", metavar="SCORES", type=Path, help="score file")
    searched.add_argument(
        "overrides",
        metavar="key=value",
        nargs="+",
        help="a budget (params=80%%), a grid (layers=24,27,30), axes= that meet it, rules; others override CONFIG",
    )
    searched.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="folder for search.json, best.yaml")
    searched.set_defaults(command=_search)


def _plan(arguments: argparse.Namespace) -> int:
    made = make_plan(arguments.scores, parse_request(_pairs(arguments.wanted)))
    made.save(arguments.to, arguments.overwrite)
    console = console_on(sys.stdout)
    console.print(render_plan(made))
    console.print(f"Plan written to {arguments.to}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    if arguments.compensate is not None:
        return _compensate(arguments)
    if arguments.config:
        raise ConfigError("--config is for --compensate: pruning alone needs no data.")
    # As after Ctrl-C, what was begun is taken away.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        prune(arguments.model, arguments.plan, arguments.output, sort_only=arguments.sort_only, scores=arguments.scores)
    finally:
        signal.signal(signal.SIGTERM, before)
    text = f"Model written to {arguments.output}"
    console_on(sys.stdout).print(text, soft_wrap=True, highlight=False, markup=False)
    return 0


def _compensate(arguments: argparse.Namespace) -> int:
    if not arguments.config:
        raise ConfigError("--compensate needs --config CONFIG, a job's YAML file with calibration data.")
    if arguments.sort_only:
        raise ConfigError(
            "--compensate and --sort-only exclude each other: a sorted model computes what it did before."
        )
    path, *overrides = arguments.config
    config = load_config(path, [*overrides, f"model.hf={arguments.model}"])
    with job_of_ranks("prune"):
        from megascore.job.compensate import CompensationRequest, run_compensation

        request = CompensationRequest(str(arguments.plan), str(arguments.output), arguments.compensate)
        run_compensation(config, request, console_on(sys.stdout))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    own, overrides = _split(arguments.overrides, ("plan", "smaller", "baselines", "json"))
    config = load_config(arguments.config, overrides)
    with job_of_ranks("evaluate"):
        from megascore.job.evaluate import EvaluationRequest, run_evaluation

        given: dict[str, Any] = {key: own[key] for key in ("plan", "smaller") if key in own}
        if "baselines" in own:
            given["baselines"] = tuple(name for name in own["baselines"].split(",") if name)
        request = EvaluationRequest(output=own.get("json"), **given)
        run_evaluation(config, request, console_on(sys.stdout))
    return 0


def _search(arguments: argparse.Namespace) -> int:
    # Keys of a config have a section.
    own = [text for text in arguments.overrides if is_plan_key(text.partition("=")[0])]
    config = load_config(arguments.config, [text for text in arguments.overrides if text not in own])
    with job_of_ranks("search"):
        from megascore.job.search import SearchRequest, run_search

        request = SearchRequest(str(arguments.scores), _pairs(own), str(arguments.to))
        run_search(config, request, console_on(sys.stdout))
    return 0


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return ``key=value`` texts by key.

    Raises:
        PlanError: a text has no ``=``, or a key comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise PlanError(f"'{text}' is not key=value: expected such as ffn=75% or params=6e9.")
        if key in pairs:
            raise PlanError(f"{key} is given twice: {pairs[key]} and {value}.")
        pairs[key] = value
    return pairs


def _split(texts: Sequence[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Return what belongs to the command itself, by key, and the overrides of the config."""
    own = [text for text in texts if text.partition("=")[0] in keys]
    return _pairs(own), [text for text in texts if text not in own]
