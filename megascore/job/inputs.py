"""What a job reads before its model: the config checked against the files, the samples, and fingerprints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascore.config import JobConfig
from megascore.data import (
    OwnSamples,
    Samples,
    Share,
    check_enough_samples,
    check_equal_shares,
    check_source,
    load_samples,
    num_steps,
    share_samples,
)
from megascore.errors import ConfigError, DataError, MegascoreError, ScoreFileError
from megascore.mcore.models.choose import model_source
from megascore.mcore.models.layout import check_sequence_length, exchanges_tokens
from megascore.mcore.models.source import ModelSource
from megascore.mcore.world.groups import data_axis
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.resume.snapshot import fingerprint_of, identity_of
from megascore.scores.score_file import Scores, check_output_path, load_scores
from megascore.sites.requests import ScoreRequest

__all__ = ["JobInputs", "check_files", "check_job", "check_model", "check_output", "finished_scores", "read_inputs"]


@dataclass(frozen=True)
class JobInputs:
    """What every rank knows of a job before the model is built."""

    source: ModelSource
    samples: OwnSamples
    weights_fingerprint: str
    total_steps: int
    identity: dict[str, Any]
    """What the results depend on; the layout, the sizes of micro-batches and paths are not part of it."""

    def metadata(self, config: JobConfig) -> dict[str, Any]:
        """Return what the score file says of the job."""
        kind, path = config.data.source()
        field = {"field": config.data.field} if kind in ("jsonl", "dataset") else {}
        return {
            "model": {"name": self.source.name, "dtype": config.model.dtype},
            "run_fingerprint": fingerprint_of(self.identity),
            "weights_fingerprint": self.weights_fingerprint,
            "data_fingerprint": self.samples.fingerprint,
            "data": {
                kind: Path(path).name,
                **field,
                "packing": config.data.packing,
                "sequence_length": config.data.sequence_length,
                "seed": config.run.seed,
            },
        }


def check_job(config: JobConfig) -> ModelSource:
    """Find what is wrong with a job before anything long starts; every rank looks at what it will need itself.

    Raises:
        MegascoreError: a wrong model, data source, layout or output path.
    """
    source = check_model(config)
    source.weights.check()
    without_name = config.model.provider is not None and config.model.load is None and config.model.fingerprint is None
    if config.run.checkpoint_dir is not None and without_name:
        raise ConfigError(
            "run.checkpoint_dir is given, but nothing tells which weights model.provider puts into its model, so a "
            "checkpoint of other weights would not be noticed: say it in words of your own, such as "
            "model.fingerprint='run 7, iteration 12000', and change them with the weights."
        )
    if world_rank() == 0:
        check_source(config.data)
        _check_output_path(config)
    return source


def check_model(config: JobConfig) -> ModelSource:
    """Check what needs no weights, no data and no output: the model, and whether it splits so. Not collective.

    Raises:
        MegascoreError: a wrong model or layout.
    """
    source = model_source(config.model)
    source.builder.check(config.parallel)
    check_sequence_length(config.data.sequence_length, config.parallel)
    return source


def check_files(config: JobConfig, source: ModelSource) -> list[str]:
    """Return what `check_job` finds wrong with files, one text for each: weights, data, output. Not collective."""
    found = []
    for check in (source.weights.check, lambda: check_source(config.data), lambda: _check_output_path(config)):
        try:
            check()
        except MegascoreError as error:
            found.append(str(error))
    return found


def _check_output_path(config: JobConfig) -> None:
    # A run with checkpoints may have written its output already: whether it has is known when the data is read.
    check_output_path(config.run.output, overwrite=config.run.overwrite or config.run.checkpoint_dir is not None)


def read_inputs(config: JobConfig, source: ModelSource, requests: Sequence[ScoreRequest]) -> JobInputs:
    """Read data and fingerprints on rank 0, and give each rank those that it needs. Collective over the world.

    Raises:
        DataError: the data is damaged, or not enough for the layout.
    """

    def read() -> tuple[Samples, str] | None:
        if world_rank() != 0:
            return None
        return _read_samples(config, source), source.fingerprint()

    own = agree("reading the data", read)
    weights_fingerprint = broadcast_object(own[1] if own else "")
    samples = share_samples(own[0] if own else None, _share(config))
    total = num_steps(samples.num_samples, config.run.global_batch_size, config.run.steps)
    identity = identity_of(
        requests,
        model={"weights_fingerprint": weights_fingerprint, "dtype": config.model.dtype, **source.identity()},
        data={
            "fingerprint": samples.fingerprint,
            "sequence_length": config.data.sequence_length,
            "num_samples": samples.num_samples,
        },
        run={
            "seed": config.run.seed,
            "steps": total,
            "global_batch_size": config.run.global_batch_size,
            "loss": config.run.loss,
            # Both ways give the same scores, but neither can go on from the other's checkpoints.
            "blockwise": config.run.blockwise,
        },
    )
    return JobInputs(source, samples, weights_fingerprint, total, identity)


def finished_scores(config: JobConfig, identity: dict[str, Any]) -> Scores | None:
    """Return the scores that this very run has written before, on every rank. Collective over the world."""

    def read() -> Scores | None:
        if world_rank() != 0 or config.run.resume == "never" or not Path(config.run.output).is_file():
            return None
        try:
            scores = load_scores(config.run.output)
        except ScoreFileError:
            # Some other file: whether it may be replaced is asked next.
            return None
        return scores if scores.metadata.get("run_fingerprint") == fingerprint_of(identity) else None

    return broadcast_object(agree("looking for a finished result", read))


def check_output(config: JobConfig) -> None:
    """Refuse an output that is there, unless it may be replaced; rank 0 looks. Not collective."""
    if world_rank() == 0:
        check_output_path(config.run.output, overwrite=config.run.overwrite)


def _share(config: JobConfig) -> Share:
    data = data_axis()
    return Share(config.run.global_batch_size, data.rank, data.size)


def _read_samples(config: JobConfig, source: ModelSource) -> Samples:
    samples = load_samples(config.data, source.tokenizer, config.run.seed)
    data_size = data_axis().size
    check_enough_samples(len(samples.tokens), data_size)
    num_steps(len(samples.tokens), config.run.global_batch_size, config.run.steps)
    if exchanges_tokens(config.parallel):
        check_equal_shares(len(samples.tokens), config.run.global_batch_size, data_size)
    largest = int(samples.tokens.max())
    if source.vocab_size is not None and largest >= source.vocab_size:
        raise DataError(
            f"{samples.source} gives token {largest}, but the model {source.name} has {source.vocab_size} tokens: the "
            "data was not tokenized for this model, or tokenizer and weights are not of one model."
        )
    return samples
