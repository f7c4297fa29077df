"""Where a job's model comes from: what builds it, and what fills it with weights.

A job talks to `ModelSource` only. Everything about a model that can be found out without building it is found when the
source is made and checked, on every rank and without collectives, so that ranks can agree before anything long starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import ConfigError, DataError
from megascore.mcore.models.bridge import BridgeBuilder, BridgeWeights, find_bridge
from megascore.mcore.models.checkpoint_args import architecture_from_args
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.models.layout import check_divisible
from megascore.mcore.models.load_huggingface import Checkpoint, load_layer, load_weights
from megascore.mcore.models.load_torch_dist import load_checkpoint
from megascore.mcore.models.load_torch_dist import load_layer as load_checkpoint_layer
from megascore.mcore.models.provider import ProviderBuilder, ProviderWeights
from megascore.weights.architecture import Architecture
from megascore.weights.fingerprint import weights_fingerprint
from megascore.weights.huggingface.architecture import architecture_of
from megascore.weights.huggingface.config import HuggingFaceModelConfig, read_config
from megascore.weights.huggingface.config_values import UnsupportedModelError
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint

__all__ = ["Builder", "ModelSource", "Weights", "model_source"]

logger = logging.getLogger(__name__)


class Builder(Protocol):
    """Makes a model without weights."""

    @property
    def name(self) -> str:
        """What the model is called in reports."""

    @property
    def vocab_size(self) -> int | None:
        """Tokens that it has; None where only the built model knows."""

    @property
    def whole_because(self) -> str | None:
        """Why its layers cannot be built empty (see `built_empty`); None where they can."""

    def identity(self) -> Mapping[str, Any]:
        """Return what tells this model from others of the same weights, as plain values. Not collective."""

    def check(self, parallel: ParallelConfig) -> None:
        """Raise where the model does not split so. Not collective."""

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Build the chunks of this rank, in evaluation mode. Inside a `parallel_world`, on every rank."""


class Weights(Protocol):
    """Fills a model that was built."""

    @property
    def whole_because(self) -> str | None:
        """Why they cannot be read one layer at a time; None where they can."""

    def check(self) -> None:
        """Raise where they are incomplete, as far as that can be known without reading them. Not collective."""

    def load(self, chunks: Sequence[Any]) -> int:
        """Fill the chunks of this rank, but for parameters on the meta device; return bytes read. On every rank."""

    def load_layer(self, chunk: Any, layer: Any) -> int:
        """Fill one layer of a chunk; return bytes read. Not collective. Only where nothing is in ``whole_because``."""

    def fingerprint(self) -> str:
        """Return what tells these weights from others."""


@dataclass(frozen=True)
class ModelSource:
    """A model as the config names it: called in this order, `check`, `build`, `load`; a dry run only builds."""

    builder: Builder
    weights: Weights
    tokenizer: str | None
    """Hugging Face directory that has the model's own tokenizer; None where there is none."""

    @property
    def name(self) -> str:
        """What the model is called in reports."""
        return self.builder.name

    @property
    def vocab_size(self) -> int | None:
        """Tokens that it has; None where only the built model knows."""
        return self.builder.vocab_size

    @property
    def whole_because(self) -> str | None:
        """Why all layers must be there at once; None where each can be built empty and read by itself."""
        return self.builder.whole_because or self.weights.whole_because

    def identity(self) -> Mapping[str, Any]:
        """Return what tells this model from others of the same weights, as plain values. Not collective."""
        return self.builder.identity()

    def check(self, parallel: ParallelConfig) -> None:
        """Check all that can be known before the model is built. Not collective.

        Raises:
            LayoutError: the model does not split so.
            ModelError: weights are missing, damaged, or of another model.
        """
        self.builder.check(parallel)
        self.weights.check()

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Build the chunks of this rank without weights, in evaluation mode.

        Inside a `parallel_world`, on every rank; collective over the pipeline stages where embeddings are tied.

        Raises:
            LayoutError: the model does not split so.
            ModelError: it cannot be built, or is shorter than ``max_sequence_length``.
        """
        return self.builder.build(parallel, dtype, device, max_sequence_length)

    def load(self, chunks: Sequence[Any]) -> None:
        """Fill the chunks of this rank, but for parameters on the meta device. On every rank.

        Raises:
            ModelError: weights are missing, damaged, or of another model.
        """
        num_bytes = self.weights.load(chunks)
        logger.info("read %.1f MB of weights of %s", num_bytes / 1e6, self.name)

    def load_layer(self, chunk: Any, layer: Any) -> None:
        """Fill one layer of a chunk, which has memory for its parameters. Not collective.

        Only where nothing is in `whole_because`.

        Raises:
            ModelError: a file is missing or damaged: it has changed since the run began.
        """
        num_bytes = self.weights.load_layer(chunk, layer)
        logger.debug("read %.1f MB of weights of layer %d", num_bytes / 1e6, layer.layer_number - 1)

    def check_tokens(self, chunks: Sequence[Any], largest: int) -> None:
        """Check data against a model that only says how many tokens it has once it is built. Not collective.

        Raises:
            DataError: ``largest``, a token number in the data, is none of the model's.
        """
        vocab_size = getattr(chunks[0], "vocab_size", None)
        if isinstance(vocab_size, int) and largest >= vocab_size:
            raise DataError(
                f"the data has token {largest}, but the model {self.name} has {vocab_size} tokens: the tokenizer is "
                "not the model's."
            )

    def fingerprint(self) -> str:
        """Return what tells the weights from others. Reads a little of the files."""
        return self.weights.fingerprint()


def model_source(config: ModelConfig) -> ModelSource:
    """Choose by the keys of the config.

    ``model.provider`` builds the model if it is given; else ``model.hf`` says what model it is; else the ``args`` in
    the checkpoint of ``model.load`` do. ``model.load`` holds the weights if it is given; else a provider's model has
    them already; else ``model.hf`` holds them.

    Not collective.

    Raises:
        ConfigError: none of the keys is given, or there is no such function.
        ModelError: a path is wrong, or what is there is not supported.
    """
    checkpoint = None if config.load is None else MegatronCheckpoint(config.load)
    if config.provider is not None:
        builder = ProviderBuilder(config.provider)
        weights = ProviderWeights(builder, config.fingerprint) if checkpoint is None else _MegatronWeights(checkpoint)
        return ModelSource(builder, weights, config.hf)
    if config.hf is not None:
        return _from_hugging_face(config.hf, checkpoint)
    if checkpoint is None:
        raise ConfigError(
            "model.hf is not given, nor model.load or model.provider: expected a Hugging Face checkpoint directory, a "
            "Megatron torch_dist checkpoint, or package.module:function."
        )
    return ModelSource(
        _ArchitectureBuilder(checkpoint.name, architecture_from_args(checkpoint)),
        _MegatronWeights(checkpoint),
        None,
    )


def _from_hugging_face(directory: str, checkpoint: MegatronCheckpoint | None) -> ModelSource:
    name = Path(directory).resolve().name
    try:
        config = read_config(directory)
    except UnsupportedModelError as error:
        bridge = find_bridge(directory, reason=error)
        builder = BridgeBuilder(name, bridge, directory)
        weights: Weights = BridgeWeights(bridge, directory) if checkpoint is None else _MegatronWeights(checkpoint)
        return ModelSource(builder, weights, directory)
    architecture = architecture_of(config)
    if checkpoint is None:
        return ModelSource(_ArchitectureBuilder(name, architecture), _HuggingFaceWeights(config, directory), directory)
    return ModelSource(
        _ArchitectureBuilder(name, checkpoint.with_its_vocabulary(architecture)),
        _MegatronWeights(checkpoint),
        directory,
    )


@dataclass(frozen=True)
class _ArchitectureBuilder:
    name: str
    architecture: Architecture
    whole_because = None

    @property
    def vocab_size(self) -> int | None:
        return self.architecture.vocab_size

    def identity(self) -> Mapping[str, Any]:
        return {"architecture": _plain(asdict(self.architecture))}

    def check(self, parallel: ParallelConfig) -> None:
        check_divisible(self.architecture, parallel)

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        return build_gpt(self.architecture, parallel, dtype, device, max_sequence_length)


@dataclass(frozen=True)
class _HuggingFaceWeights:
    config: HuggingFaceModelConfig
    directory: str
    whole_because = None

    def check(self) -> None:
        with Checkpoint(self.directory) as checkpoint:
            checkpoint.check(self.config)

    def load(self, chunks: Sequence[Any]) -> int:
        return load_weights(chunks, self.config, self.directory)

    def load_layer(self, chunk: Any, layer: Any) -> int:
        return load_layer(layer, self.config, self.directory)

    def fingerprint(self) -> str:
        return weights_fingerprint(self.directory)


@dataclass(frozen=True)
class _MegatronWeights:
    checkpoint: MegatronCheckpoint
    whole_because = None

    def check(self) -> None:
        self.checkpoint.check_files()

    def load(self, chunks: Sequence[Any]) -> int:
        return load_checkpoint(chunks, self.checkpoint)

    def load_layer(self, chunk: Any, layer: Any) -> int:
        return load_checkpoint_layer(chunk, layer, self.checkpoint)

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()


def _plain(value: Any) -> Any:
    """Return a value of an architecture as JSON has it; functions and types by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or str(value)
