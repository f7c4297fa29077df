"""The choice of a model's source by the keys of its config."""

from __future__ import annotations

from pathlib import Path

from megascore.config import ModelConfig
from megascore.errors import ConfigError
from megascore.mcore.models.bridge import BridgeBuilder, BridgeWeights, find_bridge
from megascore.mcore.models.checkpoint_args import architecture_from_args
from megascore.mcore.models.gpt import ArchitectureBuilder
from megascore.mcore.models.load_huggingface import HuggingFaceWeights
from megascore.mcore.models.load_torch_dist import TorchDistWeights
from megascore.mcore.models.provider import ProviderBuilder, ProviderWeights
from megascore.mcore.models.source import ModelSource, Weights
from megascore.weights.huggingface.config import read_config
from megascore.weights.huggingface.config_values import UnsupportedModelError
from megascore.weights.torch_dist.checkpoint import MegatronCheckpoint

__all__ = ["model_source"]


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
        weights = ProviderWeights(builder, config.fingerprint) if checkpoint is None else TorchDistWeights(checkpoint)
        return ModelSource(builder, weights, config.hf)
    if config.hf is not None:
        return _from_hugging_face(config.hf, checkpoint)
    if checkpoint is None:
        raise ConfigError(
            "model.hf is not given, nor model.load or model.provider: expected a Hugging Face checkpoint directory, a "
            "Megatron torch_dist checkpoint, or package.module:function."
        )
    return ModelSource(
        ArchitectureBuilder(checkpoint.name, architecture_from_args(checkpoint)),
        TorchDistWeights(checkpoint),
        None,
    )


def _from_hugging_face(directory: str, checkpoint: MegatronCheckpoint | None) -> ModelSource:
    name = Path(directory).resolve().name
    try:
        config = read_config(directory)
    except UnsupportedModelError as error:
        bridge = find_bridge(directory, reason=error)
        builder = BridgeBuilder(name, bridge, directory)
        weights: Weights = BridgeWeights(bridge, directory) if checkpoint is None else TorchDistWeights(checkpoint)
        return ModelSource(builder, weights, directory)
    own = ArchitectureBuilder(name, config.architecture)
    if checkpoint is None:
        return ModelSource(own, HuggingFaceWeights(config, directory), directory)
    checkpoint.check_vocabulary(config.architecture.vocab_size, "the config.json in model.hf")
    return ModelSource(own, TorchDistWeights(checkpoint), directory)
