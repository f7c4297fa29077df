"""How large a model is with some of its units: parameters, bytes, keys and values in the cache, operations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod

from megascore.plans.kept_tensors import KeptSource, kept_sources
from megascore.plans.units import Units, experts_per_token
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.tensors import EMBEDDING

__all__ = ["ModelSize", "kv_cache_bytes", "model_size"]


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model. Tied embeddings count once as parameters, and as operations in the output layer alone."""

    parameters: int
    active_parameters: int
    """Those that one token meets: of the routed experts, as many as it goes to, of average size."""
    bytes: int
    """Of the weights, as the checkpoint stores them."""
    kv_cache_bytes_per_token: int
    """Keys and values of all layers for one position, in the type of the weights."""
    flops_per_token: int
    """Two for each weight that a token is multiplied with, without attention over other positions."""

    def as_json(self) -> dict[str, int]:
        """Return the sizes by name."""
        return asdict(self)


def model_size(config: HuggingFaceModelConfig, units: Units, bytes_per_value: int) -> ModelSize:
    """Return the sizes of the model that has these units alone.

    Args:
        config: The parent, as `as_stored` returns it.
        units: What is kept.
        bytes_per_value: Of the checkpoint's type.
    """
    parameters, active, vectors, embedding = 0, Fraction(0), 0, 0
    for tensor in kept_sources(config, units):
        values = prod(tensor.shape)
        parameters += values
        active += values * _share_of_token(tensor, config)
        vectors += values if len(tensor.shape) == 1 else 0
        embedding += values if tensor.name == EMBEDDING.name else 0
    kv_heads = sum(len(kept.kv_heads) for _, kept in units.kept_layers())
    return ModelSize(
        parameters,
        round(active),
        parameters * bytes_per_value,
        2 * kv_heads * config.head_dim * bytes_per_value,
        2 * (round(active) - vectors - (0 if config.tied_embeddings else embedding)),
    )


def _share_of_token(tensor: KeptSource, config: HuggingFaceModelConfig) -> Fraction:
    """Return how much of a tensor one token meets, on average over experts."""
    of_experts = tensor.source.expert is not None or bool(tensor.source.parts)
    if not of_experts or tensor.kept is None:
        return Fraction(1)
    return Fraction(experts_per_token(config), len(tensor.kept.experts))


def kv_cache_bytes(config: HuggingFaceModelConfig, units: Units, bytes_per_value: int, batch: int, length: int) -> int:
    """Return the bytes of keys and values of so many sequences of a length; layers with a window keep no more than it.

    Args:
        config: The parent.
        units: What is kept.
        bytes_per_value: Of the cache.
        batch: Sequences.
        length: Positions of each.
    """
    model = config.architecture
    positions = 0
    for layer, kept in units.kept_layers():
        slides = model.sliding_window is not None and model.sliding_layers[layer]
        positions += len(kept.kv_heads) * (min(length, model.sliding_window or length) if slides else length)
    return 2 * positions * batch * config.head_dim * bytes_per_value
