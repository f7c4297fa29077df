"""Inputs of a job, before its model: the config checked against files and layout, the samples, and fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascore.config import DataConfig, JobConfig, ModelConfig
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
from megascore.errors import ConfigError, DataError, MegascoreError
from megascore.job.resolved import ModelForm, Output
from megascore.mcore.models.choose import model_source
from megascore.mcore.models.layout import check_sequence_length, exchanges_tokens
from megascore.mcore.models.source import ModelSource
from megascore.mcore.world.groups import data_axis
from megascore.parallel.comm import agree, broadcast_object, world_rank
from megascore.resume.snapshot import fingerprint_of, identity_of
from megascore.sites.requests import ScoreRequest, refuse_needing_job, resolve_scores

__all__ = ["JobInputs", "check_inputs", "check_job", "check_model", "load_chunks", "problems", "read_inputs"]


@dataclass(frozen=True)
class JobInputs:
    """What every rank knows of a job before the model is built."""

    source: ModelSource
    form: ModelForm
    requests: tuple[ScoreRequest, ...]
    samples: OwnSamples
    share: Share
    total_steps: int
    computes_loss: bool
    identity: dict[str, Any]
    """What the results depend on; the layout, the sizes of micro-batches and paths are not part of it."""
    metadata: dict[str, Any]
    """What the score file says of the job."""
    until: Mapping[str, float] | None = None
    """What ends the run before all steps are done."""
    keep_statistics: bool = True
    """Whether the score file has them."""


def check_job(config: JobConfig) -> ModelSource:
    """Refuse a job in which something is wrong, before anything long starts; every rank looks at what it will need.

    Not collective.

    Raises:
        MegascoreError: a wrong model, data source, layout or output path.
    """
    source = check_model(config)
    for error in problems(config, source):
        raise error
    return source


def check_model(config: JobConfig) -> ModelSource:
    """Check what needs no weights, no data and no output: the model, and whether it splits so. Not collective.

    Raises:
        MegascoreError: a wrong model or layout, or scores that can't be had layer by layer.
    """
    if config.run.blockwise:
        refuse_needing_job(resolve_scores(config.scores), "run.blockwise=true")
    source = model_source(config.model)
    source.builder.check(config.parallel)
    check_sequence_length(config.data.sequence_length, config.parallel)
    return source


def problems(config: JobConfig, source: ModelSource) -> Iterator[MegascoreError]:
    """Find what a model is not enough for: weights on every rank; data and output on rank 0, which alone needs them.

    Not collective.
    """
    has_checkpoints = config.run.checkpoint_dir is not None
    checks: list[Callable[[], None]] = [source.weights.check]
    if has_checkpoints:
        checks.append(lambda: _check_weights_are_named(config.model))
    if world_rank() == 0:
        # A run with checkpoints may have written its output already: whether it has is known when the data is read.
        output = Output(config.run.output, config.run.overwrite)
        checks += [lambda: check_source(config.data), lambda: output.check(may_be_there=has_checkpoints)]
    for check in checks:
        try:
            check()
        except MegascoreError as error:
            yield error


def check_inputs(config: JobConfig) -> ModelSource:
    """Refuse a model, layout, weights or data source that are wrong; for jobs that write no scores. Not collective.

    Raises:
        MegascoreError: see `check_job`.
    """
    source = check_model(config)
    source.weights.check()
    if world_rank() == 0:
        check_source(config.data)
    return source


def _check_weights_are_named(model: ModelConfig) -> None:
    if model.provider is not None and model.load is None and model.fingerprint is None:
        raise ConfigError(
            "run.checkpoint_dir is given, but nothing tells which weights model.provider puts into its model, so a "
            "checkpoint of other weights would not be noticed: say it in words of your own, such as "
            "model.fingerprint='run 7, iteration 12000', and change them with the weights."
        )


def read_inputs(config: JobConfig, source: ModelSource, form: ModelForm) -> JobInputs:
    """Read data and fingerprints on rank 0, and give each rank those that it needs. Collective over the world.

    Raises:
        DataError: the data is damaged, or not enough for the layout.
    """
    data = data_axis()
    share = Share(config.run.global_batch_size, data.rank, data.size, config.run.micro_batch_size)

    def read() -> tuple[Samples, str] | None:
        if world_rank() != 0:
            return None
        samples = load_samples(config.data, source.tokenizer, config.run.seed)
        _check_samples(samples, source, form, share, config.run.steps)
        return samples, source.fingerprint()

    own = agree("reading the data", read)
    weights_fingerprint = broadcast_object(own[1] if own else "")
    samples = share_samples(own[0] if own else None, share)
    total_steps = num_steps(samples.num_samples, share.global_batch_size, config.run.steps)
    requests = resolve_scores(config.scores)
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
            "steps": total_steps,
            "global_batch_size": config.run.global_batch_size,
            "loss": config.run.loss,
            # Both ways give the same scores, but neither can go on from the other's checkpoints.
            "blockwise": config.run.blockwise,
            **({} if config.run.until is None else {"until": dict(config.run.until)}),
        },
    )
    metadata = {
        "model": {"name": source.name, "dtype": config.model.dtype, **_path_of(config.model)},
        "run_fingerprint": fingerprint_of(identity),
        "weights_fingerprint": weights_fingerprint,
        "data_fingerprint": samples.fingerprint,
        "data": _facts_of_data(config.data, config.run.seed),
    }
    return JobInputs(
        source,
        form,
        requests,
        samples,
        share,
        total_steps,
        config.run.loss,
        identity,
        metadata,
        config.run.until,
        config.run.keep_statistics,
    )


def load_chunks(inputs: JobInputs) -> list[Any]:
    """Build and fill a model on this rank; its samples' tokens are checked. On every rank.

    Raises:
        MegascoreError: the model can't be built, or does not have the tokens of the data.
    """
    chunks = inputs.form.build(inputs.source)
    inputs.source.check_tokens(chunks, inputs.samples.largest_token)
    inputs.source.load(chunks)
    return chunks


def _check_samples(
    samples: Samples, source: ModelSource, form: ModelForm, share: Share, wanted_steps: int | None
) -> None:
    num_samples = len(samples.tokens)
    check_enough_samples(num_samples, share.data_size)
    num_steps(num_samples, share.global_batch_size, wanted_steps)
    if exchanges_tokens(form.parallel):
        check_equal_shares(num_samples, share.global_batch_size, share.data_size)
    largest = int(samples.tokens.max())
    if source.vocab_size is not None and largest >= source.vocab_size:
        raise DataError(
            f"{samples.source} gives token {largest}, but the model {source.name} has {source.vocab_size} tokens: the "
            "data was not tokenized for this model, or tokenizer and weights are not of one model."
        )


def _path_of(model: ModelConfig) -> dict[str, str]:
    """Return where the model's Hugging Face folder is, for whoever plans by the scores."""
    return {} if model.hf is None else {"path": str(Path(model.hf).resolve())}


def _facts_of_data(data: DataConfig, seed: int) -> dict[str, Any]:
    kind, path = data.source()
    facts = {kind: Path(path).name, "packing": data.packing, "sequence_length": data.sequence_length, "seed": seed}
    return {**facts, "field": data.field} if kind in ("jsonl", "dataset") else facts
