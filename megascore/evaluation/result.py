"""The result of an evaluation: for each model what it lost beside its parent on the same tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from megascore.evaluation.statistics import Estimate, ratio
from megascore.files.output_path import write_output
from megascore.scores.report import new_table, titled

__all__ = ["Evaluation", "ModelResult", "render_evaluation", "with_error"]

VERSION = 1


@dataclass(frozen=True)
class ModelResult:
    """One smaller model beside its parent. All figures are per predicted token."""

    name: str
    loss: float
    """In nats."""
    loss_rise: Estimate
    """Loss less that of the parent, paired by sample."""
    kl: Estimate
    """KL(parent || smaller) in nats."""
    agreement: Estimate
    """Part of the tokens where both hold the same token for the most likely one."""
    acceptance: Estimate
    """Sum over the vocabulary of the smaller of both probabilities: what speculative sampling would accept."""
    size: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the model, as in a plan; empty where they are not known."""

    @classmethod
    def of(cls, name: str, sums: Tensor, size: Mapping[str, int]) -> ModelResult:
        """Make it of sums by sample.

        Args:
            name: What the model is called.
            sums: [samples, 6] float64, by ``PAIR_SUMS``.
            size: Its sizes.
        """
        tokens, nats, other_nats, kl, agreement, acceptance = sums.unbind(1)
        return cls(
            name,
            ratio(other_nats, tokens).mean,
            ratio(other_nats - nats, tokens),
            ratio(kl, tokens),
            ratio(agreement, tokens),
            ratio(acceptance, tokens),
            dict(size),
        )

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> ModelResult:
        """Make it of what `as_json` returned.

        Raises:
            KeyError, TypeError: it is something else.
        """

        def pair(name: str) -> Estimate:
            return Estimate(_number(content[name]["mean"]), _number(content[name]["standard_error"]))

        return cls(
            str(content["name"]),
            _number(content["loss"]),
            pair("loss_rise"),
            pair("kl"),
            pair("agreement"),
            pair("acceptance"),
            {str(key): int(value) for key, value in content["size"].items()},
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it; what is no number is null."""

        def pair(estimate: Estimate) -> dict[str, float | None]:
            return {"mean": _finite(estimate.mean), "standard_error": _finite(estimate.standard_error)}

        return {
            "name": self.name,
            "loss": _finite(self.loss),
            "loss_rise": pair(self.loss_rise),
            "kl": pair(self.kl),
            "agreement": pair(self.agreement),
            "acceptance": pair(self.acceptance),
            "size": dict(self.size),
        }


@dataclass(frozen=True)
class Evaluation:
    """A parent and its smaller models on the same text."""

    parent: str
    parent_loss: Estimate
    """In nats per token; the error is over samples, unpaired."""
    parent_size: Mapping[str, int]
    num_samples: int
    num_tokens: int
    """Predicted tokens."""
    results: Sequence[ModelResult]
    facts: Mapping[str, Any]
    """Data, layout, fingerprints, versions."""
    advice: str = ""
    """What to run next."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "megascore_evaluation": VERSION,
            "parent": {
                "name": self.parent,
                "loss": _finite(self.parent_loss.mean),
                "standard_error": _finite(self.parent_loss.standard_error),
                "size": dict(self.parent_size),
            },
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "results": [result.as_json() for result in self.results],
            **self.facts,
        }

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write it as JSON; the file appears whole or not at all. Not collective.

        Raises:
            ScoreFileError: a file is there and `overwrite` is false, or it can't be written.
        """
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n"
        write_output(path, text.encode(), overwrite, "run.overwrite=true")


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """Return a table for people."""
    table = new_table()
    table.add_column("model")
    for name in ("parameters", "loss", "rise", "KL", "same token", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(
        evaluation.parent, _millions(evaluation.parent_size), f"{evaluation.parent_loss.mean:.4f}", "", "", "", ""
    )
    for result in evaluation.results:
        table.add_row(
            result.name,
            _millions(result.size),
            f"{result.loss:.4f}",
            with_error(result.loss_rise, 4),
            with_error(result.kl, 4),
            _percent(result.agreement),
            _percent(result.acceptance),
        )
    title = f"{evaluation.num_samples} samples, {evaluation.num_tokens:,} predicted tokens; nats per token"
    legend = (
        "rise: loss less the parent's, paired by sample, +- its standard error. KL(parent || model). "
        "accepted: sum of the smaller of both probabilities."
    )
    parts: list[RenderableType] = [titled(title, table), Text(legend, style="dim")]
    if evaluation.advice:
        parts.append(Text(evaluation.advice))
    return Group(*parts)


def _millions(size: Mapping[str, int]) -> str:
    return f"{size['parameters'] / 1e6:,.1f} M" if "parameters" in size else ""


def with_error(estimate: Estimate, digits: int) -> str:
    """Return ``0.5976 +-0.0736``."""
    error = "" if math.isnan(estimate.standard_error) else f" +-{estimate.standard_error:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{error}"


def _percent(estimate: Estimate) -> str:
    error = "" if math.isnan(estimate.standard_error) else f" +-{100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.mean:.1f}{error} %"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
