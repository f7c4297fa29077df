"""The door to evaluations: parent and smaller models on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megascore.config import JobConfig, load_config
from megascore.errors import ConfigError
from megascore.evaluation.result import Evaluation

__all__ = ["evaluate"]


def evaluate(
    config: JobConfig | str | Path,
    *overrides: str,
    plan: str | Path | None = None,
    smaller: str | Path | None = None,
    baselines: Sequence[str] = ("random", "weight_norm"),
    console: Console | None = None,
) -> Evaluation:
    """Compare a plan or a smaller model with its parent; what ``megascore evaluate`` does.

    Collective over the processes that torchrun started, in the layout of the config; it joins them, and leaves them at
    the end. Needs Megatron-Core.

    Args:
        config: That of a scoring job, or its YAML file: parent (``model.hf``), data, layout.
        overrides: Such as ``"data.text=held_out.txt"``; for a file alone.
        plan: File of a plan, which is evaluated by masks in the parent.
        smaller: Hugging Face folder of a smaller model.
        baselines: What the same plan is beside: units taken at random, and by the norm of their weights.
        console: Where rank 0 shows progress and result; nowhere if not given.

    Returns:
        The figures, the same on every rank.

    Raises:
        ConfigError: nothing to evaluate, overrides of a config that is no file, or a wrong config.
        MegascoreError: a wrong plan, model, text or layout, before anything long starts.
    """
    from megascore.job.evaluate import EvaluationRequest, run_evaluation

    if isinstance(config, JobConfig):
        if overrides:
            raise ConfigError("overrides are for a config file: change the config itself.")
        job = config
    else:
        job = load_config(config, overrides)
    request = EvaluationRequest(
        None if plan is None else str(plan), None if smaller is None else str(smaller), tuple(baselines)
    )
    return run_evaluation(job, request, console or Console(quiet=True))
