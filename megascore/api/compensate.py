"""The door to compensation: a smaller model whose output projections are fitted again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megascore.config import JobConfig, load_config
from megascore.errors import ConfigError

__all__ = ["compensate"]


def compensate(
    config: JobConfig | str | Path,
    plan: str | Path,
    output: str | Path,
    *overrides: str,
    method: str = "least_squares",
    console: Console | None = None,
) -> None:
    """Write the smaller model of a plan, its projections fitted again; what ``megascore prune --compensate`` does.

    Collective over the processes that torchrun started, in the layout of the config; it joins them, and leaves them at
    the end. Needs Megatron-Core.

    Args:
        config: That of a scoring job, or its YAML file: parent (``model.hf``), calibration data, layout.
        plan: File of the plan.
        output: Folder to write, on a file system that all ranks see; none is there.
        overrides: Such as ``"data.text=calibration.txt"``; for a file alone.
        method: ``least_squares`` or ``bias``.
        console: Where rank 0 shows progress; nowhere if not given.

    Raises:
        ConfigError: an unknown method, overrides of a config that is no file, or a wrong config.
        MegascoreError: a wrong plan, model, text or layout, before anything long starts; an architecture without the
            biases that ``bias`` needs.
    """
    from megascore.job.compensate import CompensationRequest, run_compensation

    if isinstance(config, JobConfig):
        if overrides:
            raise ConfigError("overrides are for a config file: change the config itself.")
        job = config
    else:
        job = load_config(config, overrides)
    run_compensation(job, CompensationRequest(str(plan), str(output), method), console or Console(quiet=True))
