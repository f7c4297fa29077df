"""Weights of a Hugging Face checkpoint into Megatron models, each rank reading only its share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megascore.weights.huggingface.checkpoint import HuggingFaceCheckpoint, PartReader
from megascore.weights.huggingface.config import HuggingFaceModelConfig
from megascore.weights.huggingface.sources import Found, find_rule, sources_of

__all__ = ["HuggingFaceWeights"]


class HuggingFaceWeights(HuggingFaceCheckpoint):
    """The weights in a Hugging Face directory, for ``GPTModel`` chunks of its architecture."""

    whole_because = None

    def load(self, chunks: Sequence[nn.Module]) -> int:
        """Fill the chunks of this rank, see `Weights`. Not collective."""
        return self._fill(
            (parameter, _found_in_chunk(chunk, name))
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if not parameter.is_meta
        )

    def load_layer(self, chunk: nn.Module, layer: nn.Module) -> int:
        """Fill one decoder layer, which knows its global number, see `Weights`."""
        return self._fill((parameter, _found_in_layer(layer, name)) for name, parameter in layer.named_parameters())

    def _fill(self, parameters: Iterable[tuple[Tensor, Found]]) -> int:
        with self.reading() as read:
            return sum(_fill(parameter, found, self.config, read) for parameter, found in parameters)


def _found_in_chunk(chunk: Any, name: str) -> Found:
    """Return the rule for a parameter and the global number of its layer."""
    found = find_rule(name)
    assert found is not None, f"no rule says where Megatron parameter '{name}' comes from"
    return found if found.layer is None else found._replace(layer=chunk.decoder.layers[found.layer].layer_number - 1)


def _found_in_layer(layer: Any, name: str) -> Found:
    found = find_rule(f"decoder.layers.0.{name}")
    assert found is not None, f"no rule says where Megatron parameter '{name}' of a layer comes from"
    return found._replace(layer=layer.layer_number - 1)


def _global_expert(found: Found, config: HuggingFaceModelConfig) -> int | None:
    experts = config.architecture.experts
    if found.expert is None or experts is None:
        return None
    num_local: int = experts.num_experts // parallel_state.get_expert_model_parallel_world_size()
    rank: int = parallel_state.get_expert_model_parallel_rank()
    return rank * num_local + found.expert


@torch.no_grad()
def _fill(parameter: Tensor, found: Found, config: HuggingFaceModelConfig, read: PartReader) -> int:
    """Fill a parameter; return bytes read."""
    rule = found.rule
    sources = sources_of(rule, config, found.layer, _global_expert(found, config))
    if not sources:
        parameter.zero_()
        return 0
    if rule.per_expert:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        num_ranks = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    # The vocabulary need not divide: rows behind its end, on the last ranks, are padding.
    padded = parameter.shape[0] if sources[0].dims[0] == "vocab" else None
    assert padded is None or padded * num_ranks >= config.architecture.vocab_size
    shares = [read(source, rule.split_dim, rank, num_ranks, size=padded) for source in sources]
    if rule.per_kv_head:
        value = weave(shares, config.architecture.num_kv_heads // num_ranks)
    else:
        # The embedding is the largest, and need not be there once more.
        value = shares[0] if len(shares) == 1 else torch.cat(shares)
    if padded is not None:
        parameter[len(value) :].zero_()
        parameter = parameter[: len(value)]
    assert value.shape == parameter.shape, f"{rule.parameters[0]}: {tuple(value.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(value)
    return sum(share.nbytes for share in shares)


def weave(shares: Sequence[Tensor], num_groups: int) -> Tensor:
    """Put the rows of several tensors together, group after group.

    Args:
        shares: Tensors that agree in all but their first dimension, which ``num_groups`` divides.
        num_groups: Number of groups of rows in each.

    Returns:
        Rows of the first group of each tensor, then of the second group of each, and so on.
    """
    grouped = [share.reshape(num_groups, -1, *share.shape[1:]) for share in shares]
    return torch.cat(grouped, dim=1).flatten(0, 1)
