"""Hugging Face models that only NVIDIA's Megatron-Bridge knows, where it is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megascore.config import ParallelConfig
from megascore.errors import ModelError
from megascore.mcore.models.arguments import config_arguments, pipeline_layout
from megascore.mcore.models.provider import checked_chunks
from megascore.weights.huggingface.folder import WeightsFolder

__all__ = ["BridgeBuilder", "BridgeWeights", "find_bridge", "has_bridge"]


def has_bridge() -> bool:
    """Whether Megatron-Bridge is installed."""
    try:
        return find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


def find_bridge(directory: str, *, reason: ModelError) -> Any:
    """Return Megatron-Bridge's ``AutoBridge`` for a checkpoint directory; reads its config only.

    Args:
        directory: Hugging Face checkpoint directory.
        reason: Why it is needed.

    Raises:
        ModelError: it is not installed, or does not know the model either.
    """
    if not has_bridge():
        raise ModelError(
            f"{reason} Install Megatron-Bridge (pip install megatron-bridge), which knows more models, or give a "
            "function that builds this one in model.provider=package.module:function."
        ) from reason
    from megatron.bridge import AutoBridge

    try:
        return AutoBridge.from_hf_pretrained(directory)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{reason} Megatron-Bridge, which is installed, cannot load it either: {error} Give a function that builds "
            "the model in model.provider=package.module:function."
        ) from error


@dataclass(frozen=True)
class BridgeBuilder:
    """Builds a model as Megatron-Bridge describes it."""

    whole_because = "Megatron-Bridge moves it there as a whole"

    name: str
    bridge: Any
    directory: str

    @property
    def vocab_size(self) -> int | None:
        """Not known before the model is built: Megatron-Bridge pads it."""
        return None

    def identity(self) -> Mapping[str, Any]:
        """Return a SHA-256 of the model's ``config.json``, from which Megatron-Bridge builds it."""
        return {"config": hashlib.sha256((Path(self.directory) / "config.json").read_bytes()).hexdigest()}

    def check(self, parallel: ParallelConfig) -> None:
        """Megatron-Bridge checks the layout when it builds."""

    def build(
        self, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> list[Any]:
        """Build the chunks of this rank without weights. In a `parallel_world`, whose groups Megatron-Bridge takes.

        Raises:
            ModelError: Megatron-Bridge refuses the layout, or the model is too short.
        """
        where = f"Megatron-Bridge for {self.directory}"
        provider = self.bridge.to_megatron_provider(load_weights=False)
        for field, value in _settings(parallel, dtype).items():
            setattr(provider, field, value)
        longest = getattr(provider, "seq_length", None)
        if longest is not None and longest < max_sequence_length:
            raise ModelError(
                f"data.sequence_length={max_sequence_length} is more than the model's {longest} positions "
                f"({where}): choose a shorter one."
            )
        try:
            provider.finalize()
            # Without its wrapper for mixed precision: the model is of one type throughout.
            chunks = provider.provide_distributed_model(wrap_with_ddp=False, mixed_precision_wrapper=None)
        except (ValueError, AssertionError) as error:
            raise ModelError(f"{where} cannot build the model in this layout: {error}") from error
        return checked_chunks(chunks, parallel, dtype, device, where)


def _settings(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    # Fused accumulation needs apex, for a gradient that scoring does not take.
    settings = {**config_arguments(parallel, dtype), "gradient_accumulation_fusion": False}
    layout = pipeline_layout(parallel)
    return settings if layout is None else {**settings, "pipeline_model_parallel_layout": layout}


@dataclass(frozen=True)
class BridgeWeights:
    """Reads a Hugging Face checkpoint by Megatron-Bridge's own loader."""

    whole_because = BridgeBuilder.whole_because

    bridge: Any
    directory: str

    def check(self) -> None:
        """Megatron-Bridge checks the files when it reads them."""

    def load(self, chunks: Sequence[Any]) -> int:
        """Fill the chunks of this rank. Collective, as Megatron-Bridge spreads weights between ranks.

        Raises:
            ModelError: the checkpoint is incomplete or damaged.
        """
        try:
            self.bridge.load_hf_weights(list(chunks))
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(f"Megatron-Bridge cannot load the weights in {self.directory}: {error!r}") from error
        return sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())

    def load_layer(self, chunk: Any, layer: Any) -> int:
        """Its loader reads whole models."""
        raise AssertionError(self.whole_because)

    def fingerprint(self) -> str:
        """Return that of the directory's safetensors files."""
        return WeightsFolder(self.directory).fingerprint()
